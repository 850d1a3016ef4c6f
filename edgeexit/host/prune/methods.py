"""
Named compositions: what papers do, as combinations that `--method` names and options change.

docs/methods.md has one row for each: what differs from the paper, and what was left out.
"""

from dataclasses import replace

from edgeexit.host.prune.composition import Composition, Target

# The share of weights that 20 steps of 10 % leave.
TWENTY_TENTHS = 0.9**20

GROWING = Composition(
    criterion="l1",
    allocator="uniform",
    schedule="one-shot",
    steps=1,
    phase_epochs=3,
    coupled=False,
)

METHODS: dict[str, Composition] = {
    # Görmez & Koyuncu, "Pruning Early Exit Networks" (arXiv 2207.03644): single weights, all
    # layers of one pool, 20 steps of 10 %.
    "gormez-all": Composition(
        criterion="magnitude",
        schedule="geometric",
        steps=20,
        scope="all",
        target=Target(what="weights", share=TWENTY_TENTHS),
    ),
    "gormez-ordered": Composition(
        criterion="magnitude",
        schedule="geometric",
        steps=20,
        scope="backbone-then-exits",
        target=Target(what="weights", share=TWENTY_TENTHS),
    ),
    # The same two strategies with filters removed: what can run faster on a board.
    "gormez-all-filters": Composition(criterion="l1", steps=4, scope="all"),
    "gormez-ordered-filters": Composition(criterion="l1", steps=4, scope="backbone-then-exits"),
    # Nascimento et al., "Pruning Everything, Everywhere, All at Once" (arXiv 2506.04513).
    "everything": Composition(
        criterion="kl", block_criterion="kl", selector="everything", coupled=False, round_to=1
    ),
    # Pons et al., "Effective Layer Pruning Through Similarity Metric Perspective" (2405.17081).
    "cka-blocks": Composition(block_criterion="cka", selector="blocks"),
    # Liao et al., NEPENTHE (arXiv 2404.16890), and EGP (2308.06619), with filters for weights.
    "nepenthe": Composition(
        criterion="state-entropy", allocator="nepenthe", steps=3, linearise=True, coupled=False
    ),
    # The same papers as they stand: single weights, half of what is left in each iteration.
    "nepenthe-weights": Composition(
        criterion="magnitude",
        allocator="nepenthe",
        steps=3,
        target=Target(what="weights", share=0.5**3),
    ),
    # "One-Shot vs Iterative" (arXiv 2508.13836).
    "hybrid": Composition(criterion="l1", schedule="hybrid", steps=4),
    # Zhi et al., polarization regularisation in one pass (arXiv 2302.10798). The sparsity term
    # must outweigh the other one while that grows, or too few gates close.
    "polarization": Composition(
        criterion="l1",
        schedule="one-shot",
        steps=1,
        phase="polarization",
        phase_options={"sparsity": 1.5},
        phase_epochs=3,
    ),
    # Rachwan et al., EarlyCroP (arXiv 2206.10451): the structured score.
    "crop": Composition(criterion="crop-s", schedule="one-shot", steps=1),
    # Zhou et al., effective filter analysis (arXiv 2206.03596): the rank as a cap. A cap is meant
    # to stop early: the target asks for little, and counts single filters.
    "effective-rank": Composition(
        criterion="taylor", rank_cap=True, round_to=1, target=Target(what="macs", share=0.9)
    ),
    # Liu et al., "The Unreasonable Effectiveness of Random Pruning" (arXiv 2202.02643).
    "random-erk": Composition(
        criterion="random",
        allocator="erk",
        schedule="one-shot",
        steps=1,
        target=Target(what="weights", share=0.2),
    ),
    # Shen et al., "When to Prune?" (arXiv 2110.12007): wait until the structure is stable.
    # It needs a window of structures before it can tell, and gives up after phase_epochs.
    "early-indicator": Composition(
        criterion="l1", schedule="one-shot", steps=1, stability=True, phase_epochs=20
    ),
    # Wang et al., "Neural Pruning via Growing Regularization" (arXiv 2012.09243).
    "greg-1": replace(GROWING, phase="greg-1"),
    "greg-2": replace(GROWING, phase="greg-2"),
    # de Jorge et al., "Progressive Skeletonization" (arXiv 2006.09081).
    "force": Composition(
        criterion="force",
        schedule="exponential",
        foresight=True,
        come_back=True,
        steps=20,
        target=Target(what="weights", share=0.1),
    ),
    "iter-snip": Composition(
        criterion="snip",
        schedule="exponential",
        foresight=True,
        steps=20,
        target=Target(what="weights", share=0.1),
    ),
    # Quétu et al., LaCoOT (arXiv 2406.08933): blocks trained to be identities.
    "lacoot": Composition(
        selector="blocks", block_criterion="cka", phase="block-identity", phase_epochs=3
    ),
    # HALP (Shen et al. 2022, arXiv 2110.10811): a knapsack on measured latencies.
    "halp": Composition(
        criterion="taylor", allocator="latency", target=Target(what="latency", share=0.6)
    ),
}
