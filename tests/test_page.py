"""The page is well-formed, needs nothing from elsewhere and shows no text unescaped."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from profiles import all_cases, built_profile, watched_cases, with_blocks, without_readings
from small import made_profile

from edgeexit.blocks import DISTURBED, Block, Reason, Verdict
from edgeexit.page import profile_page
from edgeexit.profile import Profile

PROFILE = built_profile()


def svgs(page: str) -> list[ElementTree.Element]:
    """The plots, each parsed as XML: a broken one raises."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, re.S)]


def test_a_page_has_bars_blocks_clock_and_temperature() -> None:
    page = profile_page(PROFILE)
    bars, blocks, *traces = svgs(page)
    assert len(bars.findall("rect")) == 4
    assert len(blocks.findall("circle")) == 4 * 12 * 10
    assert len(traces) == 2
    assert "CLEAN" in page
    assert "without exits" in page


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = profile_page(PROFILE)
    assert not re.search(r"<script|<link|<img|src=|href=|url\(|@import|https?:", page)


@pytest.mark.parametrize(
    "profile",
    [
        without_readings(built_profile(cases=watched_cases(), rounds=2)),
        built_profile(cases=watched_cases(), processes=1, rounds=2),
        built_profile(exits=("only",), cases=all_cases(("only",)), rounds=2),
        made_profile(),
    ],
)
def test_little_is_enough_for_a_page(profile: Profile) -> None:
    assert len(svgs(profile_page(profile))) >= 2


def test_other_peoples_text_is_escaped() -> None:
    evil = "<script>alert(1)</script>&\x1b[2J"
    verdict = Verdict(status=DISTURBED, reasons=(Reason(kind=evil, text=evil),))
    profile = built_profile(
        exits=(evil, "b"), cases=all_cases((evil, "b")), rounds=2, bundle_name=evil
    )
    hostile = replace(
        profile, verdict=verdict, measured_at=evil, made_by=evil, machine={"board": evil}
    )
    page = profile_page(hostile)
    assert "<script" not in page
    assert "\x1b" not in page
    svgs(page)


def test_a_block_far_out_stays_within_the_plot() -> None:
    far = PROFILE.processes[0].blocks[3]

    def change(_: float, block: Block) -> Block:
        return replace(block, mean_ns=block.mean_ns * 1000) if block == far else block

    (_, blocks, *_) = svgs(profile_page(with_blocks(PROFILE, change)))
    assert all(0 <= float(dot.get("cy") or -1) <= 300 for dot in blocks.findall("circle"))
