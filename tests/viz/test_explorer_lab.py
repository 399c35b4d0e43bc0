"""The explorer in the real JupyterLab: in a notebook that is not trusted, and in the same one trusted."""

import json
import os
import secrets
import subprocess
import sys
import time
from urllib.parse import urlsplit

import nbformat
import psutil
import pytest

from minivla.nn.masks import segment_mask
from minivla.recorder import Call
from minivla.segments import Segment, arrange
from minivla.viz.explorer import HINT, explore
from tests.browser import Browser

pytestmark = pytest.mark.slow
QUIET = ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
OUTPUT = "document.querySelector('.jp-Notebook .jp-RenderedHTMLCommon .minivla-explorer')"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on two copies of a notebook that holds an explorer. Returns (address, token)."""
    home = tmp_path_factory.mktemp("lab")
    root = home / "root"
    root.mkdir()
    places = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    places |= {
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "HOME": str(home),
    }
    environment = {**os.environ, **places}
    for name in ("strange", "trusted"):
        nbformat.write(notebook(), root / f"{name}.ipynb")
    trust = [sys.executable, "-m", "nbformat.sign", str(root / "trusted.ipynb")]
    subprocess.run(trust, env=environment, check=True, capture_output=True)
    token = secrets.token_hex(16)
    options = ["--no-browser", "--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={token}", *QUIET]
    options += [f"--ServerApp.root_dir={root}", *(["--allow-root"] if os.geteuid() == 0 else [])]
    with open(home / "log.txt", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=log, stderr=log, cwd=home
        )
    try:
        yield address_of(server, home / "runtime", home / "log.txt"), token
    finally:
        # Asked politely, it waits a minute for the kernels of the notebooks, which may still be starting.
        started = [*psutil.Process(server.pid).children(recursive=True), server]
        for process in started:
            process.kill()
        for process in started:
            process.wait()


def notebook():
    segments = arrange([Segment("state", "state", 1), Segment("chunk", "action", 6, block=1, rule="causal")])
    call = Call("predict_action_chunk", {}, segments=segments, mask=segment_mask(segments)[0])
    outputs = [
        nbformat.v4.new_output("execute_result", {"text/html": explore(call).html, "text/plain": "Explorer"})
    ]
    cells = [
        nbformat.v4.new_code_cell("trace.explore()", outputs=outputs),
        nbformat.v4.new_code_cell("1 + 1"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def address_of(server, runtime, log):
    """Where the server listens, from the file that it writes when it is ready."""
    end = time.monotonic() + 90
    while time.monotonic() < end and server.poll() is None:
        for path in runtime.glob("jpserver-*.json"):
            if told := path.read_text():
                return json.loads(told)["url"]
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def show(browser, lab, name):
    address, token = lab
    page = browser.open(f"{address}lab/tree/{name}.ipynb?token={token}", width=1300, height=900)
    page.wait(f"{OUTPUT} !== null", f"JupyterLab to show {name}.ipynb", timeout=120)
    time.sleep(1)  # a script would have run by now
    return page


def only_here(page, lab):
    host = urlsplit(lab[0]).netloc
    elsewhere = [
        url[:80]
        for url in page.requests
        if not url.startswith(("data:", "blob:")) and urlsplit(url).netloc != host
    ]
    return elsewhere == []


def test_untrusted_a_picture_and_one_line_remain(browser, lab):
    page = show(browser, lab, "strange")
    assert page.evaluate(f"{OUTPUT}.innerText").strip() == HINT
    assert page.evaluate(f"{OUTPUT}.querySelector('img').naturalWidth") > 300
    assert page.evaluate(f"{OUTPUT}.querySelectorAll('script, style, canvas').length") == 0
    assert page.evaluate(f"{OUTPUT}.shadowRoot") is None
    assert only_here(page, lab)


def test_trusted_it_lives_and_keeps_its_keys(browser, lab):
    page = show(browser, lab, "trusted")
    page.wait(f"{OUTPUT}.shadowRoot !== null", "the explorer to wake")
    root = f"{OUTPUT}.shadowRoot"
    assert HINT not in page.evaluate(f"{OUTPUT}.innerText")
    box = f"{root}.querySelector('[data-token=\"3\"]').getBoundingClientRect()"
    page.click(*page.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({box})"))
    kept = f"Number({root}.querySelector('[aria-selected=true]').dataset.token)"
    lit = f"[...{root}.querySelectorAll('.ribbon .cell')].map(n => Number(n.classList.contains('open')))"
    assert page.evaluate(kept) == 3
    assert page.evaluate(lit) == [1, 1, 1, 1, 0, 0, 0]
    # in JupyterLab's command mode the arrows would choose another cell of the notebook
    cells = "[...document.querySelectorAll('.jp-Notebook-cell')]"
    active = f"{cells}.findIndex(n => n.classList.contains('jp-mod-active'))"
    before = page.evaluate(active)
    for key, token in (("ArrowRight", 4), ("ArrowDown", 5), ("End", 6), ("PageUp", 0)):
        page.press(key)
        assert page.evaluate(kept) == token
    assert page.evaluate(active) == before
    assert only_here(page, lab)
