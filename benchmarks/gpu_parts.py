"""The parts of `gpu_report.py`, their order and their time, and the goals that they are judged by.

A part is killed after `LIMIT` times its estimate, so that none takes more than three minutes, and a
chapter of several neither. Estimates are for an H200 with nothing compiled before; those of parts
that `benchmarks/results` has are measured, the others judged.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

LIMIT, CHAPTER_S = 1.5, 180.0
VS_TORCH, STEP = "vs_pytorch:measure", "train_step:measure"
SMALLEST = (
    "--model haiku --num_layers 1 --max_tokens 32 --batch_size 2 --data sample --tokenizer bytes"
)


@dataclass(frozen=True, eq=False)
class Part:
    """A part of the report, run in a process of its own.

    Attributes:
        call: module:function, which returns a dict with "rows". It is given `tiny`, `text` and
            `budget_s`, those of them that it takes.
        tiny: its arguments in a rehearsal, if they differ. What an earlier part calls with the same
            ones is not rehearsed again.
        gpu: "alone": it has the GPU's memory for itself; "two": JAX and torch share it;
            "all": it runs in parallel with others.
    """

    name: str
    call: str
    estimate_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] | None = None
    gpu: Literal["alone", "two", "all"] = "alone"

    @property
    def limit_s(self) -> float:
        """Seconds after which it is killed."""
        return LIMIT * self.estimate_s

    def arguments_for(self, tiny: bool) -> dict[str, Any]:
        """The arguments of the call, of a rehearsal or not."""
        return self.tiny if tiny and self.tiny is not None else self.arguments


def step_of(model: str, estimate_s: float) -> Part:
    """The step of a model: its rate, its time by part, its idle time, and its plan."""
    return Part(model, STEP, estimate_s, {"models": (model,), "rounds": 4}, {})


def against_torch(
    name: str,
    model: str,
    estimate_s: float,
    *against: str,
    documents: int = 1,
    tiny: dict[str, Any] | None = None,
) -> Part:
    """A race with torch; on a CPU, FlexAttention has no backward pass."""
    given = {"models": (model,), "rounds": 4, "against": against, "documents": documents}
    small = {"models": ("tiny",), "against": ("eager", *against)}
    if documents > 1:
        small |= {"against": ("eager",), "documents": 4}
    return Part(name, VS_TORCH, estimate_s, given, small | (tiny or {}), gpu="two")


# What is timed is compiled alone, as XLA and torch choose its kernels by timing them.
CHAPTERS: dict[str, tuple[Part, ...]] = {
    "exactness": (Part("exactness", "gpu_checks:exactness", 120),),
    "verse": (step_of("verse", 45),),
    "stanza": (step_of("stanza", 55),),
    "documents": (
        against_torch("vs_verse_documents", "verse", 115, "compiled", "fused_loss", documents=8),
    ),
    "documents_stanza": (
        against_torch("vs_stanza_documents", "stanza", 115, "compiled", "fused_loss", documents=8),
    ),
    "attention": (Part("attention", "attention:measure", 60),),
    "fp8": (Part("fp8", "train_step:fp8", 80, {"rounds": 4}),),
    "rows": (against_torch("vs_verse", "verse", 110, "compiled", "fused_loss"),),
    "rows_stanza": (against_torch("vs_stanza", "stanza", 115, "compiled", "fused_loss"),),
    "run": (Part("run", "profiled_run:measure", 40),),
    "exact_sums": (Part("exact_sums", "train_step:exact_sums", 40, {"rounds": 4}),),
    "enwik8": (
        step_of("enwik8", 40),
        against_torch("vs_enwik8", "enwik8", 70, "compiled", tiny={"models": ("tiny, muon",)}),
    ),
    "head": (Part("cross_entropy", "cross_entropy:measure", 65),),
    "max_autotune": (against_torch("vs_verse_autotuned", "verse", 120, "max_autotune"),),
    "epic": (step_of("epic", 50),),
    "logits": (Part("logits", "train_step:logits", 40, {"rounds": 4}),),
    "max_autotune_stanza": (against_torch("vs_stanza_autotuned", "stanza", 120, "max_autotune"),),
    "optimizer": (Part("optimizer", "optimizer:measure", 70, {"rounds": 5}, {}),),
    "checks": (
        Part("model", "gpu_checks:model", 110, gpu="all"),
        Part("attention_checks", "gpu_checks:attention", 120, gpu="all"),
        Part("optimizers", "gpu_checks:optimizer", 80, gpu="all"),
        Part("training", "gpu_checks:training", 60, gpu="all"),
    ),
    "start": (
        Part(
            "startup",
            "startup:measure",
            50,
            {"flags": ["--model", "verse", "--data", "sample"], "starts": 2},
            {"flags": SMALLEST.split(), "starts": 1},
        ),
        Part("compile_time", "compile_time:measure", 70),
    ),
    "generate": (Part("generate", "generate:on_gpu", 90, gpu="two"),),
    "norms": (Part("norms", "norms:measure", 40),),
    "fp8_torch": (
        against_torch(
            *("vs_stanza_fp8", "stanza, fp8", 120, "fp8"),
            tiny={"models": ("tiny, fp8",), "against": ("eager", "fp8")},
        ),
    ),
}
PARTS = tuple(part for parts in CHAPTERS.values() for part in parts)


# --------------------------------------------------------------------------------------- the goals

RATE, RACE, PLAN = "of the matmul rate", "ours is faster by", "plan is off by"
BEST = {"who": "best of torch"}


@dataclass(frozen=True)
class Goal:
    """Bounds on a figure: that of `column`, in the row where other columns have given values.

    Attributes:
        parts: where to look. If several have the figure, the worst counts.
    """

    text: str
    parts: tuple[str, ...]
    row: dict[str, Any]
    column: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def bound(self) -> str:
        """The bounds as text."""
        named = (("at least", self.at_least), ("at most", self.at_most))
        return ", ".join(f"{name} {value:g}" for name, value in named if value is not None)

    def missed_by(self, value: float) -> float:
        """How far a figure is outside of the bounds; negative inside."""
        below = -float("inf") if self.at_least is None else self.at_least - value
        above = -float("inf") if self.at_most is None else value - self.at_most
        return max(below, above)

    def measured(self, parts: dict[str, Any]) -> float | None:
        """The worst figure of a report's parts; None if no part has it."""
        values = [
            row[self.column]
            for name in self.parts
            for row in parts.get(name, {}).get("rows", ())
            if self.row.items() <= row.items() and row.get(self.column) is not None
        ]
        return max(values, key=self.missed_by, default=None)


def races(text: str, model: str, whole: float, documents: float) -> tuple[Goal, ...]:
    """The goals of a model against the best of torch."""
    rows, masked = (f"vs_{model}", f"vs_{model}_autotuned"), (f"vs_{model}_documents",)
    return (
        Goal(f"{text} against the best of torch", rows, BEST, RACE, whole),
        Goal(f"{text}, 8 documents a row, against the best", masked, BEST, RACE, documents),
    )


def steps(model: str, text: str, rate: float) -> tuple[Goal, ...]:
    """The goals of a model's step alone."""
    row = {"model": model}
    return (
        Goal(f"{text}: {RATE}", (model,), row, RATE, rate),
        Goal(f"{text}: the plan of the step's time", (model,), row, PLAN, -0.05, 0.05),
    )


VERSE, STANZA = {"model": "verse"}, {"model": "stanza"}
GOALS = (
    Goal(
        "verse: losses and norms of 200 steps, repeated",
        ("exactness",),
        {"check": "repeated: steps that differ"},
        "error",
        at_most=0,
    ),
    Goal(
        "verse: losses and norms of 200 steps, resumed elsewhere",
        ("exactness",),
        {"check": "resumed elsewhere: steps that differ"},
        "error",
        at_most=0,
    ),
    Goal("verse: exactness costs", ("exact_sums",), VERSE, "exactness costs", at_most=0.02),
    *steps("verse", "verse", 0.52),
    *steps("stanza", "stanza", 0.62),
    *steps("epic", "epic, 4 layers", 0.64),
    *races("verse", "verse", 1.10, 1.25),
    *races("stanza", "stanza", 1.08, 1.20),
    Goal("stanza: fp8 against bf16", ("fp8",), STANZA, "fp8 is faster by", at_least=1.25),
    Goal("enwik8: ms a step", ("enwik8",), {"model": "enwik8"}, "step ms", at_most=45),
    Goal("a run of verse, each step logged: idle", ("run",), VERSE, "idle", at_most=0.01),
    Goal("a run of verse: busy time in modules", ("run",), VERSE, "named", at_least=0.95),
    Goal("verse: idle", ("verse",), VERSE, "idle", at_most=0.01),
    Goal("stanza: idle", ("stanza",), STANZA, "idle", at_most=0.01),
    Goal(
        "head of 131,072 words: TFLOP/s",
        ("cross_entropy",),
        {"head": "131,072 words", "logits": "as in training"},
        "TFLOP/s",
        at_least=560,
    ),
    Goal(
        "softmax kernel, 2,048 x 49,152 float32 logits: us",
        ("cross_entropy",),
        {"logits": "softmax kernel, float32"},
        "us",
        at_most=165,
    ),
    Goal(
        "cross-entropy in chunks against all at once",
        ("cross_entropy",),
        {"logits": "as in training"},
        "against all at once",
        at_most=1.03,
    ),
    Goal(
        "AdamW's update against one pass",
        ("optimizer",),
        {"optimizer": "adamw", "moments": "float32"},
        "ratio",
        at_most=1.15,
    ),
    Goal(
        "one text of verse: decode against transformers",
        ("generate",),
        {"model": "verse", "batch": 1},
        "decode_ratio",
        at_least=1.0,
    ),
    Goal(
        "one text of verse: decode, share of the bandwidth",
        ("generate",),
        {"model": "verse", "batch": 1},
        "of the bandwidth",
        at_least=0.6,
    ),
    Goal(
        "verse: from the command to the first step, programs kept",
        ("startup",),
        {"part": "total"},
        "warm wall s",
        at_most=15.0,
    ),
)
