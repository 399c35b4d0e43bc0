"""Pictures of what is inside a policy and around it. Imports matplotlib, which `import minivla` does not.

    tokens.py      the token ribbon                      masks.py      who may look at whom
    words.py       a prompt's tokens as boxes of text
    attention.py   what a query looks at                 rollout.py    the same through several layers
    cache.py       what each run computes and reads      modulation.py how a time steers the norms
    spelling.py    FAST's tokens on the frequencies they spell
    flow.py        from noise to action                  denoising.py  the same as paths on the table
    score.py       the field that drives it, in numbers  basins.py     drawn at several noise levels
    keypoints.py   where an encoder sees things
    chunks.py      action chunks, the gripper's path     ensemble.py   temporal ensembling
    codes.py       how discrete policies use codes       codebook.py   what each stands for
    emerging.py    what the first tokens of a chunk say
    choice.py      how a call chose among them           plane.py      a chunk as a path over the table
    training.py    loss, success, normalisation, windows
    paths.py       ways of many samples in two dimensions
    curves.py      curves, each with its name at its end
    frames.py      film strips, contact sheets           animate.py    GIFs;  video.py    HTML5 video
    explorer.py    one call as a page to point at
    palette.py     the colour of each token kind, the sheet figures are drawn on
    layout.py, pictures.py, scene.py   what these share

Every function takes data and returns a matplotlib Figure; `ax=`, where there is one panel, draws on axes of
yours. Figures are known to pyplot: a cell ends in `plt.show()`. Titles state what the function can see for
itself; `title=` says it better.
"""

from minivla.viz.animate import Gif, animate_flow, figure_frame, rollout_frames, save_gif, show_gif, tile
from minivla.viz.attention import (
    attention_shares,
    attention_weights,
    plot_attention,
    plot_look,
    striking_patch,
)
from minivla.viz.basins import plot_score_field
from minivla.viz.cache import cache_savings, plot_cache
from minivla.viz.choice import plot_choice
from minivla.viz.chunks import gripper_path, plot_chunk, plot_gripper_path
from minivla.viz.codebook import plot_codebook
from minivla.viz.codes import perplexity, plot_code_grid, plot_code_usage
from minivla.viz.curves import plot_curves
from minivla.viz.denoising import plot_denoising_paths
from minivla.viz.emerging import partial_chunks, plot_emerging
from minivla.viz.ensemble import ensemble_weights, plot_ensemble
from minivla.viz.explorer import Explorer, explore
from minivla.viz.flow import convergence, plot_convergence, plot_denoising, plot_flow
from minivla.viz.frames import plot_cameras, plot_frames
from minivla.viz.keypoints import keypoints_of, plot_keypoints
from minivla.viz.masks import plot_mask
from minivla.viz.modulation import modulations, plot_modulation
from minivla.viz.palette import KIND_COLOURS, style
from minivla.viz.paths import plot_paths
from minivla.viz.plane import Plane
from minivla.viz.rollout import attention_rollout, plot_rollout, rollout_weights
from minivla.viz.spelling import plot_spelling
from minivla.viz.tokens import plot_tokens, seen_tokens
from minivla.viz.training import plot_loss, plot_normalisation, plot_success, plot_windows
from minivla.viz.video import Video, show_video

__all__ = [
    "KIND_COLOURS",
    "Explorer",
    "Gif",
    "Plane",
    "Video",
    "animate_flow",
    "attention_rollout",
    "attention_shares",
    "attention_weights",
    "cache_savings",
    "convergence",
    "ensemble_weights",
    "explore",
    "figure_frame",
    "gripper_path",
    "keypoints_of",
    "modulations",
    "partial_chunks",
    "perplexity",
    "plot_attention",
    "plot_cache",
    "plot_cameras",
    "plot_choice",
    "plot_chunk",
    "plot_code_grid",
    "plot_code_usage",
    "plot_codebook",
    "plot_convergence",
    "plot_curves",
    "plot_denoising",
    "plot_denoising_paths",
    "plot_emerging",
    "plot_ensemble",
    "plot_flow",
    "plot_frames",
    "plot_gripper_path",
    "plot_keypoints",
    "plot_look",
    "plot_loss",
    "plot_mask",
    "plot_modulation",
    "plot_normalisation",
    "plot_paths",
    "plot_rollout",
    "plot_score_field",
    "plot_spelling",
    "plot_success",
    "plot_tokens",
    "plot_windows",
    "rollout_frames",
    "rollout_weights",
    "save_gif",
    "seen_tokens",
    "show_gif",
    "show_video",
    "striking_patch",
    "style",
    "tile",
]
