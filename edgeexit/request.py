"""
What tune is asked for, and whether its files can answer that.

Callers see Request, which tune, its ledger and verify share, promise, which says what of it was
certified, and checks of the files: check_inputs, check_profile and check_verdict. Hidden here:
where in a policy file the request is written down, and what is refused whatever the samples say,
so that no use of them is counted for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import __version__, families, ledger
from edgeexit.blocks import DISTURBED, EMULATED, Verdict
from edgeexit.bundle import Bundle
from edgeexit.choice import FIXED
from edgeexit.errors import BadFile, Disturbed, OutOfReach, UsageError
from edgeexit.evaluate import Record
from edgeexit.families import METHODS, ON_AVERAGE, Method
from edgeexit.files import Table
from edgeexit.names import choose
from edgeexit.overlap import SIGNIFICANCE, Bloom, overlap_count
from edgeexit.policy import MEASURES, Confidence, Policy
from edgeexit.prices import Prices
from edgeexit.profile import Profile
from edgeexit.targets import ENERGY, Target
from edgeexit.verdict import judge

TUNING, CERTIFICATE = "tuning", "certificate"

# A time below this share of the quickest path is out of reach, whatever that is wrong by.
_HOPELESS = 0.5


@dataclass(frozen=True, kw_only=True)
class Request:
    """
    The options of one call of tune: with the files, all that decides about its policy.

    *method* is a name in METHODS, or "fixed" with *thresholds*, one for each exit but the final
    one, inf for a dropped exit. *measure* is a name in MEASURES; None takes the one that does
    best on tuning. *seed* is only written down. UsageError for what cannot be meant.
    """

    target: Target
    method: str = "path"
    thresholds: tuple[float, ...] | None = None
    measure: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        choose(self.method, {**METHODS, FIXED: None}, "method")
        if (self.method == FIXED) != (self.thresholds is not None):
            raise UsageError(
                "thresholds: expected with the method 'fixed', and only there",
                hint="--method fixed --measure max_prob --thresholds 0.9,inf",
            )
        if self.measure is not None:
            choose(self.measure, MEASURES, "confidence measure")
        if self.thresholds is not None:
            if self.measure is None:
                raise UsageError(
                    "thresholds: belong to one confidence measure",
                    hint=f"give --measure: {list(MEASURES)}",
                )
            if any(map(math.isnan, self.thresholds)):
                raise self._bad_thresholds("")

    def _bad_thresholds(self, count: str) -> UsageError:
        return UsageError(
            f"thresholds: {list(self.thresholds or ())}, expected {count}numbers or inf: one for "
            "each exit but the final one"
        )

    @property
    def way(self) -> Method:
        """The method itself."""
        if self.thresholds is not None:
            return families.fixed(self.thresholds)
        return METHODS[self.method]

    @property
    def measures(self) -> tuple[str, ...]:
        """The confidence measures to be tried."""
        return tuple(MEASURES) if self.measure is None else (self.measure,)

    @property
    def wants_energy(self) -> bool:
        """Whether joules decide anything."""
        return self.target.minimize == ENERGY or self.target.energy_budget_mj is not None

    def _thresholds_text(self) -> list[str] | None:
        # As text: JSON has no infinity.
        return None if self.thresholds is None else list(map(str, self.thresholds))

    def digest(self, files: Mapping[str, str | None]) -> str:
        """
        The ledger's request digest: of all options, and the digests of all *files*.

        The rate has no part in it: it decides about the verdict, not about the policy.
        """
        target = self.target.to_document()
        del target["rate_hz"]
        return ledger.request_digest(
            {
                "made_by": __version__,
                **files,
                **target,
                "method": self.method,
                "thresholds": self._thresholds_text(),
                "measure": self.measure,
                "seed": self.seed,
            }
        )

    def provenance(self) -> dict[str, Any]:
        """
        What a policy's provenance tells of the request, as JSON values.

        The rest stands in its target and its certificate.
        """
        return {"measure_asked": self.measure, "thresholds_asked": self._thresholds_text()}

    @classmethod
    def from_policy(cls, table: Table) -> "Request":
        """The request that the policy file *table* was made for; BadFile if it tells of none."""
        held, told = table.table("certificate"), table.table("provenance")
        thresholds = None
        if told.values.get("thresholds_asked") is not None:
            try:
                thresholds = tuple(map(float, told.list_of("thresholds_asked", str)))
            except ValueError as error:
                raise BadFile(f"{told.where}: thresholds_asked: expected numbers") from error
        try:
            return cls(
                target=Target.from_document(table.table("target")),
                method=held.get("method", str),
                thresholds=thresholds,
                measure=None
                if told.values.get("measure_asked", "") is None
                else told.get("measure_asked", str),
                seed=held.get("seed", int),
            )
        except UsageError as error:
            raise BadFile(f"{table.where}: {error}", hint=error.hint) from error

    def check(self, record: Record, profile: Profile, reference: Record | None = None) -> None:
        """
        Refuse what tune cannot do with these files whatever the samples say.

        UsageError for one exit, a missing split, thresholds that are too few or too many and
        joules that are not there; BadFile for files that do not fit together; OutOfReach for
        times far below what any answer takes.
        """
        if record.bundle_digest != profile.bundle_digest or record.exits != profile.exits:
            raise BadFile(
                f"the record is of bundle {record.bundle_digest[:12]}, "
                f"the profile of {profile.bundle_digest[:12]}",
                hint="make both with the same bundle",
            )
        check_choice(record.exits)
        early = len(record.exits) - 1
        if self.thresholds is not None and len(self.thresholds) != early:
            raise self._bad_thresholds(f"{early} ")
        for name in self.measures:
            for spec in record.specs:
                Confidence(name, spec)
        for split in (TUNING, CERTIFICATE):
            rows_of(record, split)
        if self.wants_energy:
            final = record.exits[-1]
            hint = "measure them with: edgeexit profile --meter ... (edgeexit meters lists them)"
            if profile.energy is None:
                raise UsageError("the profile holds no joules", hint=hint)
            if math.isnan(Prices(profile).energy_mj((final,), final)):
                raise UsageError(
                    "the profile holds no joules of the network without early exits", hint=hint
                )
        quickest_ms = min(map(profile.value_ns, profile.cases)) / 1e6
        target = self.target
        for what, limit in (("mean latency", target.latency_budget_ms), ("p95", target.p95_ms)):
            if limit is not None and limit < _HOPELESS * quickest_ms:
                raise OutOfReach(
                    f"a {what} of {limit:g} ms: the quickest way to any answer takes "
                    f"{quickest_ms:.4g} ms",
                    hint="allow more, or take a smaller network",
                )
        if reference is not None:
            reference_correct(record, reference)


def promise(policy: Policy) -> str:
    """What the certificate of *policy* promises of all that was asked for, in a line of text."""
    held, target = policy.certificate, policy.target
    against = str(policy.provenance.get("reference", ""))
    against = against if against.startswith("the ") else f"the reference {against[:12]}"
    spent = held.get("ledger") or {}
    samples = f"{held['samples']} samples"
    if spent:
        samples += f", use {spent['use']} of these samples"
    caps, averaged = [], ""
    if held.get("promise") == ON_AVERAGE:
        averaged = (
            f"Kept on average over draws of {samples}, with no confidence attached: at most "
            f"{_percent(held['level'], 2)} of the answers become wrong against {against}."
        )
    elif held["level"] is not None:
        caps.append(f"the accuracy drop against {against} is at most {_percent(held['level'], 2)}")
    for key, words in (
        ("latency_budget_ms", "the mean latency is at most {:g} ms"),
        ("energy_budget_mj", "the mean energy is at most {:g} mJ"),
        ("p95_ms", "95 % of the inputs take at most {:g} ms"),
    ):
        if target.get(key) is not None:
            caps.append(words.format(target[key]))
    policies = "1 policy" if held["certified"] == 0 else f"{held['certified'] + 1} policies"
    certified = (
        f"Certified with {_percent(target['confidence'], 0)} confidence on {samples}: "
        f"{', '.join(caps)} (on samples drawn like these; {policies} at once)."
    )
    return " ".join([certified] * bool(caps) + [averaged] * bool(averaged))


def _percent(share: float, places: int) -> str:
    """*share* with so many decimal places, with more if they would not tell it."""
    text, exact = f"{share:.{places}%}", f"{100.0 * share:.6g}"
    return text if float(text[:-1]) == float(exact) else f"{exact}%"


def check_choice(exits: Sequence[str]) -> None:
    """UsageError if there is no other exit than the final one."""
    if len(exits) == 1:
        raise UsageError(
            f"the bundle has one exit ({exits[0]!r}): nothing to choose",
            hint="edgeexit attach gives a network more exits",
        )


def rows_of(record: Record, split: str) -> NDArray[np.int64]:
    """Positions of the samples of *split*; UsageError if there are none."""
    rows = record.rows(split)
    if not len(rows):
        have = ", ".join(sorted(set(map(str, record.splits)))) or "none"
        raise UsageError(
            f"the record has no samples of the split {split!r} (has: {have})",
            hint="edgeexit evaluate BUNDLE SET:tuning+certificate --record FILE.npz makes one",
        )
    return rows


def reference_correct(
    record: Record, reference: Record, what: str = "the reference's record"
) -> NDArray[np.bool_]:
    """
    Whether the final exit of *reference* is right about each sample of *record*, bool (N,).

    Samples are found again by their digests. BadFile, about *what*, if one is missing or labelled
    otherwise.
    """
    places = {row.tobytes(): k for k, row in enumerate(reference.digests)}
    found = np.array([places.get(row.tobytes(), -1) for row in record.digests], np.int64)
    if (found < 0).any():
        raise BadFile(
            f"{what} lacks {int((found < 0).sum())} of {len(record)} samples",
            hint="make it of the same samples: edgeexit evaluate REFERENCE SET:tuning+certificate "
            "--policy none --record FILE.npz",
        )
    if (reference.labels[found] != record.labels).any():
        raise BadFile(
            f"{what} has other labels for {int((reference.labels[found] != record.labels).sum())} "
            "of the same samples",
            hint="make both with the same calibration set, and classes in the same order",
        )
    right: NDArray[np.bool_] = reference.correct()[found, -1]
    return right


def check_verdict(profile: Profile, *, accept_disturbed: bool = False) -> Verdict:
    """
    What the values of *profile*, judged anew, say about it; what it says itself is not asked.

    Disturbed if the machine is emulated, or was not itself meanwhile, unless *accept_disturbed*:
    times of an emulated machine are no times of the board at all, whoever accepts them. A profile
    that has not converged passes: its costs are right, but less sure than asked for.
    """
    verdict = judge(profile)
    again = f"edgeexit profile --device {profile.device}"
    if verdict.status == EMULATED:
        hint = f"measure on the board itself with: {again}"
    elif verdict.status == DISTURBED and not accept_disturbed:
        hint = (
            f"measure again while nothing else runs with: {again}; or take it as it is "
            "with --accept-disturbed"
        )
    else:
        return verdict
    raise Disturbed(f"the profile of {profile.bundle_name} cannot be trusted: {verdict}", hint=hint)


def _check_logits(bundle: Bundle, record: Record) -> None:
    """Refuse (BadFile) logits that are none of *bundle*'s, and samples that stand twice."""
    classes, named = record.logits.shape[2], len(bundle.class_names)
    if classes != named:
        raise BadFile(
            f"the record has {classes} classes, this bundle {named}",
            hint="make a record of this bundle",
        )
    for exit, mine, theirs in zip(bundle.exits, record.specs, bundle.logits, strict=True):
        if mine != theirs:
            raise BadFile(
                f"the record's logits of exit {exit!r} have another name, type or scale than this "
                "bundle's",
                hint="make a record of this bundle",
            )
    ids = record.ids[np.isin(record.splits, (TUNING, CERTIFICATE))]
    names, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        twice = str(names[counts > 1][0])
        raise BadFile(
            f"the record has {int((counts - 1).sum())} samples whose ids are there already (the "
            f"first: {twice[:40]!r})",
            hint="give each sample of tuning and certificate once: edgeexit evaluate BUNDLE "
            "SET:tuning+certificate --record FILE.npz",
        )


def check_profile(bundle: Bundle, profile: Profile, device: str) -> None:
    """Refuse (BadFile) a profile of another bundle or device."""
    _check_is_of(bundle, "profile", profile.bundle_digest, profile.exits)
    if profile.device != device:
        raise BadFile(
            f"the profile was measured on {profile.device!r}, expected {device!r}",
            hint=f"edgeexit profile --device {device}",
        )


def _check_is_of(bundle: Bundle, what: str, digest: str, exits: Sequence[str]) -> None:
    if digest != bundle.digest:
        raise BadFile(
            f"the {what} is of bundle {digest[:12]}, this bundle is {bundle.digest[:12]}",
            hint=f"make a {what} of this bundle",
        )
    if exits != bundle.exits:
        raise BadFile(
            f"the {what} has the exits {list(exits)}, this bundle {list(bundle.exits)}",
            hint=f"make a {what} of this bundle",
        )


def check_inputs(bundle: Bundle, record: Record, profile: Profile, device: str) -> None:
    """
    Refuse (BadFile) a record or profile of something else, and samples that were used before.

    A policy tuned on samples from training or activation ranges promises too much; so does one
    checked on those it was tuned on.
    """
    _check_is_of(bundle, "record", record.bundle_digest, record.exits)
    _check_logits(bundle, record)
    check_profile(bundle, profile, device)
    tuning, certificate = (
        {row.tobytes() for row in record.digests[record.rows(split)]}
        for split in (TUNING, CERTIFICATE)
    )
    if tuning & certificate:
        raise BadFile(
            f"{len(tuning & certificate)} samples are in both tuning and certificate",
            hint="make disjoint splits with: edgeexit calibration make",
        )
    ranges = bundle.ranges_digests
    if ranges is not None:
        shared = (tuning | certificate) & {row.tobytes() for row in ranges}
        if shared:
            raise BadFile(
                f"{len(shared)} samples were already used for the activation ranges",
                hint="choose samples that the conversion has not seen",
            )
    data = bundle.training_bloom
    if data is not None:
        used = record.digests[np.isin(record.splits, (TUNING, CERTIFICATE))]
        hits, tested, chance = overlap_count(Bloom.from_bytes(data), used)
        if hits and chance < SIGNIFICANCE:
            raise BadFile(
                f"{hits} of {tested} tuning and certificate samples were used for training",
                hint="choose a set of samples that the network has never seen",
            )
