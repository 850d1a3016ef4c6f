"""
Whether a policy is what its files give: everything is computed anew and compared.

Callers see verify and Outcome. Hidden here: files are compared by their very bytes first, because
an altered record or profile may still be read as a sound one; of the policy's own words only what
was asked for is believed, and that only if the ledger knows it; the policy's bytes are compared as
well, so that no altered bit is lost in reading. Only in the last digits of what was worked out in
floating point may two processors differ.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit import __version__, ledger, tune
from edgeexit.bundle import load_bundle
from edgeexit.errors import EdgeExitError, UsageError, hinting
from edgeexit.evaluate import Record
from edgeexit.files import Table, file_digest, json_bytes, parse_json, read_bytes
from edgeexit.policy import Policy
from edgeexit.profile import Profile
from edgeexit.request import CERTIFICATE, Request, check_inputs, promise

_SHOWN = 60

# Figures that are worked out in floating point: another processor, or another version of a library,
# may add up in another order. All else was decided or counted, and must be equal.
_WORKED_OUT = re.compile(
    r"expected\b|certificate\.(path_costs|p_value)\b|provenance\.(costs|profile_verdict)\b"
)
_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Where a policy is not what its files give; nowhere, if what it promises holds."""

    policy: Policy
    differences: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether everything was as expected."""
        return not self.differences

    def to_document(self) -> dict[str, Any]:
        """The object that `edgeexit verify --json` prints."""
        return {
            "holds": self.holds,
            "differences": list(self.differences),
            "device": self.policy.device,
            "bundle": self.policy.bundle_digest,
            "promise": promise(self.policy) if self.holds else None,
        }

    @property
    def sentence(self) -> str:
        """What a policy without differences promises."""
        return f"recomputed, all equal. {promise(self.policy)}"


def verify(
    policy_path: Path,
    bundle_path: Path,
    *,
    record_path: Path,
    profile_path: Path,
    reference_path: Path | None = None,
    ledger_path: Path | None = None,
) -> Outcome:
    """
    Compute the policy in the file *policy_path* anew from its files, and compare all of it.

    *ledger_path* None: where tune puts it (edgeexit.ledger.place). BadFile for files that cannot
    be read as what they should be; those that can, but are not what the policy was made from, are
    differences.
    """
    data = read_bytes(policy_path)
    with hinting("make the policy again with: edgeexit tune"):
        document = parse_json(data, str(policy_path))
        policy = Policy.from_document(document)
    if not policy.certificate:
        raise UsageError(
            f"{policy_path}: has no certificate, so there is nothing to verify",
            hint="edgeexit tune makes policies with one",
        )
    bundle = load_bundle(bundle_path)
    digests = {
        "record": file_digest(record_path),
        "reference": None if reference_path is None else file_digest(reference_path),
        "bundle": bundle.digest,
        "profile": file_digest(profile_path),
    }
    told = policy.certificate.get("digests")
    found = list(differences(told, digests, "certificate.digests"))
    if found:  # of other files, nothing else can be expected to be the same
        return Outcome(policy=policy, differences=tuple(found))
    record, profile = Record.load(record_path), Profile.load(profile_path)
    reference = None if reference_path is None else Record.load(reference_path)
    check_inputs(bundle, record, profile, policy.device)
    if ledger_path is None:
        ledger_path = ledger.place(record.set_name, record.set_digest, record_path)
    try:
        expected = _recomputed(policy, document, record, profile, reference, ledger_path, digests)
    except _Unlike as error:
        return Outcome(policy=policy, differences=(str(error),))
    found = list(differences(document.values, expected.to_document()))
    if not found and data != json_bytes(document.values):
        found = [f"{policy_path}: not as edgeexit wrote it, though all values are the same"]
    return Outcome(policy=policy, differences=tuple(found))


class _Unlike(Exception):
    """One difference that leaves nothing else to compare."""


def _recomputed(
    policy: Policy,
    document: Table,
    record: Record,
    profile: Profile,
    reference: Record | None,
    ledger_path: Path,
    digests: Mapping[str, str | None],
) -> Policy:
    """What tune makes of the files for what the policy says was asked, if the ledger knows that."""
    try:
        request = Request.from_policy(document)
        made_by = policy.provenance["made_by"]
    except (EdgeExitError, KeyError) as error:
        raise _Unlike(f"certificate: does not tell how it was made: {error}") from error
    if made_by != __version__:
        raise _Unlike(
            f"provenance.made_by: found {_short(made_by)}, expected {__version__!r}: another "
            "version may choose otherwise"
        )
    if not ledger_path.exists():
        raise _Unlike(f"{ledger_path}: no ledger, expected the one that counted this use")
    key = ledger.split_key(record.digests[record.rows(CERTIFICATE)])
    use = ledger.find(ledger_path, key, request.digest(digests))
    if use is None:
        raise _Unlike(
            f"{ledger_path}: knows no use of these samples for what the policy says was asked"
        )
    try:
        return tune.tune(
            *(record, profile, request),
            reference=reference,
            use=use,
            digests=digests,
            accept_disturbed=True,
        ).policy
    except EdgeExitError as error:
        raise _Unlike(f"certificate: cannot be made again: {error}") from error


def differences(found: Any, expected: Any, place: str = "") -> Iterator[str]:
    """
    Where two JSON values differ, one line each: place, what was found, what was expected.

    At places where figures of a policy are worked out in floating point, 1e-9 of them is no
    difference.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in [*found, *(key for key in expected if key not in found)]:
            inner = f"{place}.{key}" if place else str(key)
            if key not in found:
                yield f"{inner}: missing, expected {_short(expected[key])}"
            elif key not in expected:
                yield f"{inner}: found {_short(found[key])}, expected no such key"
            else:
                yield from differences(found[key], expected[key], inner)
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for k, (mine, yours) in enumerate(zip(found, expected, strict=True)):
            yield from differences(mine, yours, f"{place}[{k}]")
    elif isinstance(found, float) and isinstance(expected, float) and _WORKED_OUT.match(place):
        # The worst residual is a share of what was measured already.
        least = _TOLERANCE if place.endswith(".worst_residual") else 0.0
        if not math.isclose(found, expected, rel_tol=_TOLERANCE, abs_tol=least):
            yield f"{place}: found {_short(found)}, expected {_short(expected)}"
    elif type(found) is not type(expected) or found != expected:
        yield f"{place}: found {_short(found)}, expected {_short(expected)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
