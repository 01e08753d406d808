"""The options of ``mpoc finetune`` that say how a network is trained."""

from __future__ import annotations

from typing import Annotated

import typer

HOW = "How"

Epochs = Annotated[
    float | None, typer.Option(help="Passes over the training split. Default: 1.", rich_help_panel=HOW)
]
Steps = Annotated[int | None, typer.Option(help="Steps, in the place of epochs.", rich_help_panel=HOW)]
Batch = Annotated[int, typer.Option(help="Examples a step, over all processes.", rich_help_panel=HOW)]
Accumulate = Annotated[
    int,
    typer.Option(
        help="Parts a process computes its share of a batch in, to save memory.", rich_help_panel=HOW
    ),
]
Optimizer = Annotated[str, typer.Option(help="sgd or adamw.", rich_help_panel=HOW)]
LearningRate = Annotated[
    float | None,
    typer.Option(help="Peak learning rate. Default: sgd 0.01, adamw 0.0003.", rich_help_panel=HOW),
]
Momentum = Annotated[float, typer.Option(help="Of sgd.", rich_help_panel=HOW)]
Nesterov = Annotated[
    bool, typer.Option("--nesterov", help="Nesterov's momentum, of sgd.", rich_help_panel=HOW)
]
L2 = Annotated[
    float,
    typer.Option(
        help="L2 of Gao et al., Eq. (7): (l2/2)·Σ|w|² over all parameters is part of the loss.",
        rich_help_panel=HOW,
    ),
]
WeightDecay = Annotated[float, typer.Option(help="Decoupled decay, of adamw.", rich_help_panel=HOW)]
Schedule = Annotated[
    str,
    typer.Option(help="Of the learning rate: cosine, constant or exponential.", rich_help_panel=HOW),
]
Warmup = Annotated[
    float, typer.Option(help="Steps of linear warm-up; below 1 a share of all.", rich_help_panel=HOW)
]
Gamma = Annotated[float, typer.Option(help="Factor of the exponential schedule.", rich_help_panel=HOW)]
DecayEvery = Annotated[int, typer.Option(help="Epochs from one factor to the next.", rich_help_panel=HOW)]
Clip = Annotated[
    float | None,
    typer.Option(help="Largest norm of the gradient, that of --l2 not counted.", rich_help_panel=HOW),
]
Dropout = Annotated[
    float | None,
    typer.Option(help="Of the network's dropout. Default: its own; with --teacher 0.", rich_help_panel=HOW),
]
Precision = Annotated[
    str,
    typer.Option(help="Of the arithmetic: fp32, bf16 or fp16 (GPU).", rich_help_panel=HOW),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Recompute activations in the backward pass: less memory, more time.",
        rich_help_panel=HOW,
    ),
]
EvalEvery = Annotated[
    int | None, typer.Option(help="Steps between evaluations. Default: an epoch.", rich_help_panel=HOW)
]
Patience = Annotated[
    int | None,
    typer.Option(
        help="Stop after so many evaluations without gain; the best weights are written.",
        rich_help_panel=HOW,
    ),
]
Best = Annotated[
    bool,
    typer.Option(
        "--best", help="Write the weights that are best on the validation split.", rich_help_panel=HOW
    ),
]
Runs = Annotated[
    int,
    typer.Option(
        help="Train so often, from seed, seed+1, …; gives mean ± σ. The first seed's is written.",
        rich_help_panel=HOW,
    ),
]
Seed = Annotated[int, typer.Option(help="Of all that training draws.", rich_help_panel=HOW)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=HOW)]
