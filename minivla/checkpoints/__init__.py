"""Loading: from a folder in LeRobot's format to a policy, with an account of every tensor.

    load(source)       a policy on which everything fits, or an error that says what does not
    receipt(source)    the same account from safetensors headers alone: no tensor is read, none allocated
    list_checkpoints() the checkpoints that come with minivla

`stored.py` knows safetensors files, `account.py` compares what they hold with what a policy needs, `hub.py`
finds folders and repositories, `loading.py` puts the three together. Saving is `Policy.save`.
"""

from minivla.checkpoints.account import CheckpointError as CheckpointError
from minivla.checkpoints.account import Entry as Entry
from minivla.checkpoints.account import Receipt as Receipt
from minivla.checkpoints.hub import list_checkpoints as list_checkpoints
from minivla.checkpoints.loading import POLICIES as POLICIES
from minivla.checkpoints.loading import load as load
from minivla.checkpoints.loading import receipt as receipt
from minivla.checkpoints.stored import write_headers as write_headers

__all__ = [
    "POLICIES",
    "CheckpointError",
    "Entry",
    "Receipt",
    "list_checkpoints",
    "load",
    "receipt",
    "write_headers",
]
