"""
Cut a bundle down to the exits that a policy keeps.

Callers see recut. Hidden here: segments around a dropped exit grow together and its head goes,
so nothing is loaded or handed over that no answer needs; the kept exits' stored logits are those
of the parent bit for bit, which is why the parent's record and policies go on being valid.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgeexit.bundle import Bundle, SelfTest, write_bundle
from edgeexit.cut import SegmentPlan, cut, uncut
from edgeexit.errors import ParityError, Unsupported, UsageError
from edgeexit.files import json_bytes
from edgeexit.interpreter import check_edges, open_interpreter, try_first
from edgeexit.names import unknown
from edgeexit.policy import Parent, Policy
from edgeexit.vetting import Held


def recut(bundle: Bundle, kept: Sequence[str], path: Path | str) -> Bundle:
    """
    Write the bundle *path* that holds only the *kept* exits of *bundle*, and names it as parent.

    One kept exit makes a static network. The parent's policies that keep exactly these exits are
    copied, with thresholds in the parent's order. The self-test keeps the converting machine's
    answers. UsageError for unknown, no, or all exits, or if *path* holds something else,
    ParityError if a self-test sample is answered otherwise here, Unsupported, StorageError.
    """
    path = Path(path)
    for name in kept:
        if name not in bundle.exits:
            raise unknown(name, bundle.exits, "exit")
    names = tuple(name for name in bundle.exits if name in kept)
    if not names or names == bundle.exits:
        raise UsageError(
            f"{bundle.path}: keeping {len(names)} of {len(bundle.exits)} exits cuts nothing out",
            hint="name some of them, not all",
        )
    if path.resolve() == bundle.path.resolve():
        raise UsageError(f"{path}: is the bundle to be cut itself", hint="choose another folder")
    whole = bundle.model_data()
    where = str(bundle.path / bundle.model)
    exits = {name: bundle.exit_tensors[name] for name in names}
    model_data = uncut(whole, bundle.exit_tensors, names, where=where)
    plans = cut(model_data, exits, where=where)
    if tuple(plan.exit for plan in plans) != names:
        raise Unsupported(
            f"{where}: without the others, exits {list(names)} come in the order "
            f"{[plan.exit for plan in plans]}",
            hint="keep all exits",
        )
    test = bundle.selftest()
    _check_parity(bundle, test.inputs, exits, whole, model_data, plans)
    return write_bundle(
        path,
        name=path.name.removesuffix(".edgeexit"),
        model_data=model_data,
        exits=exits,
        class_names=bundle.class_names,
        preprocess=bundle.preprocess,
        selftest=SelfTest(
            samples=test.samples,
            inputs=test.inputs,
            logits=test.logits[:, [bundle.exits.index(name) for name in names]],
        ),
        scheme=bundle.scheme,
        provenance=bundle.provenance,
        calibration_set=bundle.calibration_set,
        ranges_digests=bundle.ranges_digests,
        training_bloom=bundle.training_bloom,
        parent=Parent(digest=bundle.digest, exits=bundle.exits),
        policies=_policies(bundle, names),
    )


def _policies(bundle: Bundle, names: tuple[str, ...]) -> dict[str, bytes]:
    """The bundle's own policies that keep exactly the exits *names*, as files by device."""
    found: dict[str, Policy] = {}
    for device in bundle.policy_devices():
        policy = bundle.policy_for(device)
        if policy is not None and policy.kept == names and policy.exits == bundle.exits:
            found[device] = policy
    return {device: json_bytes(policy.to_document()) for device, policy in found.items()}


def _check_parity(
    bundle: Bundle,
    inputs: NDArray[Any],
    exits: dict[str, str],
    whole: bytes,
    model_data: bytes,
    plans: Sequence[SegmentPlan],
) -> None:
    """The parent's uncut model, the child's and the child's chain must agree to the last bit."""
    feed = bundle.input.name
    pieces = (whole, model_data, *(plan.data for plan in plans))
    try_first([Held(data, f"{bundle.path}, cut down") for data in pieces])
    parent, child = open_interpreter(whole), open_interpreter(model_data)
    chain = [(plan, open_interpreter(plan.data)) for plan in plans]
    for plan, segment in chain:
        check_edges(segment, plan.inputs, plan.outputs, f"{bundle.path}, cut down")
    for number, tensor in enumerate(inputs):
        values: dict[str, NDArray[Any]] = {feed: tensor}
        for model in (parent, child):
            model.inputs[feed][...] = tensor
            model.invoke()
        for plan, segment in chain:
            for spec in plan.inputs:
                segment.inputs[spec.name][...] = values[spec.name]
            segment.invoke()
            values |= {spec.name: segment.outputs[spec.name] for spec in plan.outputs}
        for name, logits in exits.items():
            wanted = parent.outputs[logits].tobytes()
            if not wanted == child.outputs[logits].tobytes() == values[logits].tobytes():
                raise ParityError(
                    f"exit {name!r}: cut down to {list(exits)}, the network answers differently "
                    f"to self-test sample {number}",
                    hint="this is a defect of the cut: please report the network",
                )
