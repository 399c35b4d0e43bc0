"""Pictures of what is inside a policy and around it. Imports matplotlib, which `import minivla` does not.

    palette.py     the colour of each token kind, the sheet figures are drawn on
    tokens.py      the token ribbon                      masks.py      who may look at whom
    attention.py   what a query looks at                 chunks.py     action chunks, the gripper's path
    ensemble.py    temporal ensembling                   training.py   loss, normalisation, windows
    animate.py     GIFs                                  layout.py, pictures.py   what these share

Every function takes data and returns a matplotlib Figure; `ax=`, where there is one panel, draws on axes of
yours. Figures are known to pyplot: a cell ends in `plt.show()`. Titles state what the function can see for
itself; `title=` says it better.
"""

from minivla.viz.animate import Gif, figure_frame, rollout_frames, save_gif, show_gif, tile
from minivla.viz.attention import (
    attention_rollout,
    attention_shares,
    attention_weights,
    plot_attention,
    plot_look,
)
from minivla.viz.chunks import gripper_path, plot_chunk, plot_gripper_path
from minivla.viz.ensemble import ensemble_weights, plot_ensemble
from minivla.viz.masks import plot_mask
from minivla.viz.palette import KIND_COLOURS, style
from minivla.viz.tokens import plot_tokens
from minivla.viz.training import plot_loss, plot_normalisation, plot_windows

__all__ = [
    "KIND_COLOURS",
    "Gif",
    "attention_rollout",
    "attention_shares",
    "attention_weights",
    "ensemble_weights",
    "figure_frame",
    "gripper_path",
    "plot_attention",
    "plot_chunk",
    "plot_ensemble",
    "plot_gripper_path",
    "plot_look",
    "plot_loss",
    "plot_mask",
    "plot_normalisation",
    "plot_tokens",
    "plot_windows",
    "rollout_frames",
    "save_gif",
    "show_gif",
    "style",
    "tile",
]
