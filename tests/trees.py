"""
Trees of boards for tests: rebuilt from documentation and published logs, not recorded.

tree("rpi4") writes the files and command outputs that such a board would show below a folder
and opens it as a Machine. Serial numbers, MAC addresses and host names in here are invented
(they are there so that `devices record` can be seen to leave them out).
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from edgeexit.machine import Machine, command_file

Texts = dict[str, str]

SERIAL = "10000000deadbeef"
MAC = "dc:a6:32:0b:ad:01"
HOST_NAME = "kitchen-camera-7"

PMIC = """\
   3V7_WL_SW_A current(0)=0.00292761A
   3V3_SYS_A current(1)=0.09466040A
   1V8_SYS_A current(2)=0.20692440A
  DDR_VDD2_A current(3)=0.00000000A
  DDR_VDDQ_A current(4)=0.00000000A
   1V1_SYS_A current(5)=0.14736370A
    0V8_SW_A current(6)=0.24884690A
  VDD_CORE_A current(7)=0.81262990A
   3V3_DAC_A current(17)=0.00006103A
   3V3_ADC_A current(18)=0.00012207A
   0V8_AON_A current(16)=0.00357766A
      HDMI_A current(22)=0.01257276A
 3V7_WL_SW_V volt(8)=3.69972800V
   3V3_SYS_V volt(9)=3.31078100V
   1V8_SYS_V volt(10)=1.80292500V
  DDR_VDD2_V volt(11)=1.11054100V
  DDR_VDDQ_V volt(12)=0.60634270V
   1V1_SYS_V volt(13)=1.10370800V
    0V8_SW_V volt(14)=0.80248580V
  VDD_CORE_V volt(15)=0.86065850V
   3V3_DAC_V volt(20)=3.30780900V
   3V3_ADC_V volt(21)=3.30658800V
   0V8_AON_V volt(19)=0.79872540V
      HDMI_V volt(23)=5.13368000V
     EXT5V_V volt(24)=5.12936000V
      BATT_V volt(25)=0.01074220V
"""

_NO_PMIC = 'error=1 error_msg="Command not registered"\n'
_A53 = "fp asimd evtstrm crc32 cpuid"
_A76 = (
    "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop "
    "asimddp"
)


def tree(
    folder: Path,
    name: str,
    *,
    files: Mapping[str, str | None] | None = None,
    commands: Mapping[str, str | None] | None = None,
) -> Machine:
    """
    The board *name* (one of BOARDS) below *folder*, as a Machine.

    *files* and *commands* ("vcgencmd get_throttled": its output) are laid over it; None takes
    one away. May be called again to change files of a standing tree: see also put and set_clock.
    """
    machine = Machine(folder)
    put(machine, BOARDS[name]() | dict(files or {}), commands)
    return machine


def put(
    machine: Machine,
    files: Mapping[str, str | None] | None = None,
    commands: Mapping[str, str | None] | None = None,
) -> None:
    """Write (None: remove) files and command outputs of a standing tree, each by rename."""
    wanted = dict(files or {})
    wanted |= {command_file(line.split(" ")): text for line, text in (commands or {}).items()}
    for name, text in wanted.items():
        path = machine.path(name)
        if text is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name[-200:]}.part")
        fresh.write_text(text)
        fresh.replace(path)


def set_clock(machine: Machine, mhz: float) -> None:
    """Let all processors run at *mhz*: what cpufreq says, and on a Pi what the firmware says."""
    for name in machine.glob("sys/devices/system/cpu/cpufreq/policy*/scaling_cur_freq"):
        put(machine, {name: f"{round(mhz * 1e3)}\n"})
    measured = "vcgencmd measure_clock arm"
    if machine.exists(command_file(measured.split(" "))):
        put(machine, commands={measured: f"frequency(0)={round(mhz * 1e6)}\n"})


# ---------------------------------------------------------------- what all boards have


def _command(line: str, output: str) -> Texts:
    return {command_file(line.split(" ")): output}


def _linux(*, release: str, machine: str, cores: int, memory_kb: int, system: str) -> Texts:
    """What any 64-bit Debian-like system shows. Loads and counters are those of an idle one."""
    each = "4000 10 2000 400000 100 0 30 0 0 0"
    total = " ".join(str(int(n) * cores) for n in each.split())
    stat = [f"cpu  {total}", *(f"cpu{n} {each}" for n in range(cores)), "btime 1763700000"]
    pressure = "some avg10=0.00 avg60=0.10 avg300=0.05 total=1234567\n"
    return {
        "proc/stat": "\n".join(stat) + "\n",
        "proc/loadavg": "0.08 0.03 0.01 1/180 4242\n",
        "proc/uptime": "4100.00 16000.00\n",
        "proc/meminfo": f"MemTotal:       {memory_kb} kB\nMemFree:        {memory_kb // 2} kB\n"
        f"MemAvailable:   {memory_kb * 3 // 4} kB\nSwapTotal:      102396 kB\n"
        "SwapFree:       101372 kB\n",
        "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n/var/swap\tfile\t102396\t1024\t-2\n",
        "proc/pressure/cpu": pressure + pressure.replace("some", "full"),
        "proc/pressure/memory": pressure + pressure.replace("some", "full"),
        # The kernel allows cores that are not there, too.
        "proc/self/status": "Name:\tpython3\nCpus_allowed:\tffff\nCpus_allowed_list:\t0-15\n",
        "proc/sys/kernel/osrelease": f"{release}\n",
        "proc/sys/kernel/ostype": "Linux\n",
        "proc/sys/kernel/hostname": f"{HOST_NAME}\n",
        "proc/version": f"Linux version {release} (user@{HOST_NAME}) #1 SMP PREEMPT\n",
        "etc/os-release": f'PRETTY_NAME="{system}"\nNAME="{system.split()[0]}"\n',
        "etc/hostname": f"{HOST_NAME}\n",
        "sys/class/net/eth0/address": f"{MAC}\n",
        "sys/devices/system/cpu/online": f"0-{cores - 1}\n",
        "sys/devices/system/cpu/possible": f"0-{cores - 1}\n",
        "sys/devices/system/cpu/present": f"0-{cores - 1}\n",
        **_command("uname -m", f"{machine}\n"),
        **_command("getconf LONG_BIT", "64\n"),
        **_command("getconf GNU_LIBC_VERSION", "glibc 2.36\n"),
    }


def _policy(first: int, last: int, top_mhz: int, low_mhz: int, governor: str) -> Texts:
    """A cpufreq policy of the cores first..last, running at its top."""
    place = f"sys/devices/system/cpu/cpufreq/policy{first}"
    cpus = " ".join(map(str, range(first, last + 1)))
    return {
        f"{place}/affected_cpus": f"{cpus}\n",
        f"{place}/related_cpus": f"{cpus}\n",
        f"{place}/cpuinfo_max_freq": f"{top_mhz * 1000}\n",
        f"{place}/cpuinfo_min_freq": f"{low_mhz * 1000}\n",
        f"{place}/scaling_max_freq": f"{top_mhz * 1000}\n",
        f"{place}/scaling_min_freq": f"{low_mhz * 1000}\n",
        f"{place}/scaling_cur_freq": f"{top_mhz * 1000}\n",
        f"{place}/scaling_governor": f"{governor}\n",
        f"{place}/scaling_available_governors": f"performance powersave {governor}\n",
        f"{place}/scaling_driver": "cpufreq-dt\n",
        f"{place}/stats/time_in_state": f"{low_mhz * 1000} 30000\n{top_mhz * 1000} 410\n",
    }


def _arm_cores(*kinds: tuple[int, str, str, int, str]) -> str:
    """/proc/cpuinfo of (count, part, variant, revision, features) kinds of cores."""
    blocks, number = [], 0
    for count, part, variant, revision, features in kinds:
        for _ in range(count):
            blocks.append(
                f"processor\t: {number}\nBogoMIPS\t: 108.00\nFeatures\t: {features}\n"
                f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: {variant}\n"
                f"CPU part\t: {part}\nCPU revision\t: {revision}\n"
            )
            number += 1
    return "\n".join(blocks)


def _device_tree(model: str, *compatible: str) -> Texts:
    # The kernel ends such texts with a NUL.
    return {
        "proc/device-tree/model": f"{model}\0",
        "proc/device-tree/compatible": "".join(f"{text}\0" for text in compatible),
        "proc/device-tree/serial-number": f"{SERIAL}\0",
    }


def _zones(**millidegrees: int) -> Texts:
    texts: Texts = {}
    for number, (kind, value) in enumerate(millidegrees.items()):
        place = f"sys/class/thermal/thermal_zone{number}"
        texts |= {f"{place}/type": kind.replace("_", "-") + "\n", f"{place}/temp": f"{value}\n"}
    return texts


def _hwmon(number: int, name: str, **values: object) -> Texts:
    place = f"sys/class/hwmon/hwmon{number}"
    return {
        f"{place}/name": f"{name}\n",
        **{f"{place}/{key}": f"{text}\n" for key, text in values.items()},
    }


# ---------------------------------------------------------------- Raspberry Pis


def _raspberry(
    model: str,
    *,
    revision: str,
    compatible: tuple[str, str],
    cores: str,
    memory_kb: int,
    top_mhz: int,
    low_mhz: int,
) -> Texts:
    info = f"\nRevision\t: {revision}\nSerial\t\t: {SERIAL}\nModel\t\t: {model}\n"
    return {
        **_linux(
            release="6.12.47+rpt-rpi-v8",
            machine="aarch64",
            cores=4,
            memory_kb=memory_kb,
            system="Debian GNU/Linux 12 (bookworm)",
        ),
        **_device_tree(model, *compatible),
        **_policy(0, 3, top_mhz, low_mhz, "ondemand"),
        **_zones(cpu_thermal=48686),
        **_hwmon(0, "cpu_thermal", temp1_input=48686, temp1_crit=110000),
        **_hwmon(1, "rpi_volt", in0_lcrit_alarm=0),
        "proc/cpuinfo": cores + info,
        **_command("vcgencmd get_throttled", "throttled=0x0\n"),
        **_command("vcgencmd measure_clock arm", f"frequency(0)={top_mhz * 1000000 + 457088}\n"),
        **_command("vcgencmd measure_temp", "temp=48.6'C\n"),
        **_command("vcgencmd measure_volts core", "volt=0.8563V\n"),
        **_command("vcgencmd get_config arm_freq", f"arm_freq={top_mhz}\n"),
        **_command(
            "vcgencmd version",
            "2024/09/10 14:40:57\nCopyright (c) 2012 Broadcom\nversion f5b0a2ee (release)\n",
        ),
        **_command("vcgencmd pmic_read_adc", _NO_PMIC),
    }


def rpi_zero2w() -> Texts:
    """A Raspberry Pi Zero 2 W with 64-bit Raspberry Pi OS. Rebuilt, not recorded."""
    return _raspberry(
        "Raspberry Pi Zero 2 W Rev 1.0",
        revision="902120",
        compatible=("raspberrypi,model-zero-2-w", "brcm,bcm2837"),
        cores=_arm_cores((4, "0xd03", "0x0", 4, _A53)),
        memory_kb=426780,
        top_mhz=1000,
        low_mhz=600,
    )


def rpi3b_plus() -> Texts:
    """A Raspberry Pi 3B+. Rebuilt, not recorded."""
    return _raspberry(
        "Raspberry Pi 3 Model B Plus Rev 1.3",
        revision="a020d3",
        compatible=("raspberrypi,3-model-b-plus", "brcm,bcm2837"),
        cores=_arm_cores((4, "0xd03", "0x0", 4, _A53)),
        memory_kb=931884,
        top_mhz=1400,
        low_mhz=600,
    )


def rpi4() -> Texts:
    """A Raspberry Pi 4B with 4 GB. Rebuilt, not recorded."""
    return _raspberry(
        "Raspberry Pi 4 Model B Rev 1.4",
        revision="c03114",
        compatible=("raspberrypi,4-model-b", "brcm,bcm2711"),
        cores=_arm_cores((4, "0xd08", "0x0", 3, _A53)),
        memory_kb=3884360,
        top_mhz=1800,
        low_mhz=600,
    )


def rpi5() -> Texts:
    """A Raspberry Pi 5 with 8 GB; its PMIC answers. Rebuilt, not recorded."""
    return {
        **_raspberry(
            "Raspberry Pi 5 Model B Rev 1.0",
            revision="d04170",
            compatible=("raspberrypi,5-model-b", "brcm,bcm2712"),
            cores=_arm_cores((4, "0xd0b", "0x4", 1, _A76)),
            memory_kb=8256048,
            top_mhz=2400,
            low_mhz=1500,
        ),
        **_hwmon(1, "rp1_adc", in1_input=1474, in2_input=2540, temp1_input=53041),
        **_hwmon(2, "pwmfan", fan1_input=2987, pwm1=75),
        **_hwmon(3, "rpi_volt", in0_lcrit_alarm=0),
        **_command("vcgencmd pmic_read_adc", PMIC),
    }


# ---------------------------------------------------------------- other ARM boards


def jetson_orin_nano() -> Texts:
    """A Jetson Orin Nano developer kit with JetPack 6; three INA3221 rails. Rebuilt."""
    return {
        **_linux(
            release="5.15.148-tegra",
            machine="aarch64",
            cores=6,
            memory_kb=7802096,
            system="Ubuntu 22.04.5 LTS",
        ),
        **_device_tree(
            "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit",
            "nvidia,p3768-0000+p3767-0005",
            "nvidia,tegra234",
        ),
        **_policy(0, 3, 1510, 115, "schedutil"),
        **_policy(4, 5, 1510, 115, "schedutil"),
        **_zones(cpu_thermal=50125, gpu_thermal=50687, soc0_thermal=48531, tj_thermal=50687),
        # cv0's domain sleeps: its zone has a type, and reading temp fails.
        "sys/class/thermal/thermal_zone4/type": "cv0-thermal\n",
        **_hwmon(0, "pwmfan", pwm1=66),
        **_hwmon(
            1,
            "ina3221",
            in1_label="VDD_IN",
            in2_label="VDD_CPU_GPU_CV",
            in3_label="VDD_SOC",
            in1_input=5080,
            in2_input=5072,
            in3_input=5080,
            curr1_input=976,
            curr2_input=120,
            curr3_input=288,
            shunt1_resistor=5000,
            shunt2_resistor=5000,
            shunt3_resistor=5000,
            in4_input=4.88,
            in5_input=0.6,
            in6_input=1.44,
            in1_enable=1,
            in2_enable=1,
            in3_enable=1,
            update_interval=40,
            samples=4,
        ),
        "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, BOARD: generic, EABI: aarch64\n",
        "proc/cpuinfo": _arm_cores((6, "0xd42", "0x0", 1, _A76)),
        **_command("nvpmodel -q", "NV Power Mode: 15W\n0\n"),
    }


def rock5b() -> Texts:
    """A Radxa ROCK 5B with Armbian: four A55, then four A76. Rebuilt, not recorded."""
    return {
        **_linux(
            release="6.1.115-vendor-rk35xx",
            machine="aarch64",
            cores=8,
            memory_kb=16151876,
            system="Armbian 25.2.1 bookworm",
        ),
        **_device_tree("Radxa ROCK 5B", "radxa,rock-5b", "rockchip,rk3588"),
        **_policy(0, 3, 1800, 408, "ondemand"),
        **_policy(4, 5, 2400, 408, "ondemand"),
        **_policy(6, 7, 2400, 408, "ondemand"),
        **_zones(
            soc_thermal=41615,
            bigcore0_thermal=42538,
            bigcore1_thermal=42538,
            littlecore_thermal=41615,
            center_thermal=39769,
            gpu_thermal=38846,
            npu_thermal=39769,
        ),
        "proc/cpuinfo": _arm_cores((4, "0xd05", "0x2", 0, _A76), (4, "0xd0b", "0x4", 0, _A76)),
    }


def beagleplay() -> Texts:
    """A BeaglePlay with Debian. Rebuilt, not recorded."""
    return {
        **_linux(
            release="6.6.58-ti-arm64-r23",
            machine="aarch64",
            cores=4,
            memory_kb=1929288,
            system="Debian GNU/Linux 12 (bookworm)",
        ),
        **_device_tree("BeagleBoard.org BeaglePlay", "beagle,am625-beagleplay", "ti,am625"),
        **_policy(0, 3, 1400, 200, "performance"),
        **_zones(main0_thermal=52000, main1_thermal=51300),
        "proc/cpuinfo": _arm_cores((4, "0xd03", "0x0", 4, _A53 + " aes pmull sha1 sha2")),
    }


# ---------------------------------------------------------------- a PC


def x86_host() -> Texts:
    """A laptop with two cores, RAPL readable, on its battery. Rebuilt, not recorded."""
    core = (
        "processor\t: {n}\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 142\n"
        "model name\t: Intel(R) Core(TM) i5-8250U CPU @ 1.60GHz\nstepping\t: 10\n"
        "cpu MHz\t\t: 1600.000\nflags\t\t: fpu sse sse2 ssse3 sse4_1 sse4_2 avx fma avx2\n"
    )
    rapl = "sys/class/powercap"
    battery = "sys/class/power_supply/BAT0"
    return {
        **_linux(
            release="6.1.0-28-amd64",
            machine="x86_64",
            cores=2,
            memory_kb=8030000,
            system="Debian GNU/Linux 12 (bookworm)",
        ),
        **_policy(0, 0, 3400, 400, "powersave"),
        **_policy(1, 1, 3400, 400, "powersave"),
        **_zones(acpitz=27800, x86_pkg_temp=46000),
        **_hwmon(0, "coretemp", temp1_label="Package id 0", temp1_input=46000),
        "sys/class/thermal/thermal_zone1/type": "x86_pkg_temp\n",
        "sys/class/dmi/id/sys_vendor": "LENOVO\n",
        "sys/class/dmi/id/product_name": "20L7001TGE\n",
        "sys/class/dmi/id/product_serial": f"{SERIAL}\n",
        "proc/cpuinfo": "\n".join(core.format(n=n) for n in range(2)),
        f"{rapl}/intel-rapl:0/name": "package-0\n",
        f"{rapl}/intel-rapl:0/energy_uj": "121342432154\n",
        f"{rapl}/intel-rapl:0/max_energy_range_uj": "262143328850\n",
        f"{rapl}/intel-rapl:0/enabled": "1\n",
        f"{rapl}/intel-rapl:0:0/name": "core\n",
        f"{rapl}/intel-rapl:0:0/energy_uj": "61342432154\n",
        f"{rapl}/intel-rapl:0:0/max_energy_range_uj": "262143328850\n",
        f"{rapl}/intel-rapl:0:1/name": "dram\n",
        f"{rapl}/intel-rapl:0:1/energy_uj": "11342432154\n",
        f"{rapl}/intel-rapl:0:1/max_energy_range_uj": "65712999613\n",
        f"{battery}/type": "Battery\n",
        f"{battery}/scope": "System\n",
        f"{battery}/status": "Discharging\n",
        f"{battery}/power_now": "6214000\n",
        f"{battery}/voltage_now": "11987000\n",
        f"{battery}/current_now": "518000\n",
        f"{battery}/energy_now": "31420000\n",
        f"{battery}/energy_full": "45020000\n",
        f"{battery}/capacity": "69\n",
        f"{battery}/serial_number": f"{SERIAL}\n",
        f"{battery}/manufacturer": "SMP\n",
        "sys/class/power_supply/AC/type": "Mains\n",
        "sys/class/power_supply/AC/online": "0\n",
    }


BOARDS: dict[str, Callable[[], Texts]] = {
    "rpi-zero2w": rpi_zero2w,
    "rpi3b+": rpi3b_plus,
    "rpi4": rpi4,
    "rpi5": rpi5,
    "jetson-orin-nano": jetson_orin_nano,
    "rock5b": rock5b,
    "beagleplay": beagleplay,
    "host": x86_host,
}
