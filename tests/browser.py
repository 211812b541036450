"""Headless Chromium over its debugging pipe: a page at a given width and colour scheme."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars --remote-debugging-pipe"
)


class Browser:
    """One page. Messages of the console, and what is refused or fails to load, are in `complaints`."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        commands, self._answers = os.pipe(), os.pipe()
        self._commands = commands[1]
        mine = {3: commands[0], 4: self._answers[1]}

        def hand_over() -> None:
            safe = {fd: os.dup2(os.dup(old), fd + 20) for fd, old in mine.items()}
            for fd, old in safe.items():
                os.dup2(old, fd)

        self._process = subprocess.Popen(
            [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=hand_over,
        )  # fmt: skip
        os.close(commands[0])
        os.close(self._answers[1])
        self._number, self._rest, self._session = 0, b"", ""
        self.complaints: list[str] = []
        page = next(one for one in self.ask("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def open(self, path: Path, width: int, *, dark: bool = False) -> None:
        """Load a file in a window of this width, 800 px high."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=scheme)
        self.complaints.clear()
        self.ask("Page.navigate", url=path.as_uri())
        while self.value("document.readyState") != "complete" or self.value("location.href") != path.as_uri():
            time.sleep(0.02)

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str) -> None:
        """A key, as from a keyboard."""
        for kind in ("rawKeyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9}[key])

    def picture(self) -> np.ndarray:
        """All of the page, uint8 [H, W, 3]."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True, format="png")["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol."""
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        message = {"id": self._number, "method": method, "params": parameters} | session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            if answer.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled", "Network.loadingFailed"):
                self.complaints.append(json.dumps(answer["params"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._answers[0]], [], [], 60)[0], "the browser does not answer"
            piece = os.read(self._answers[0], 1 << 20)
            assert piece, "the browser has ended"
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(30)
        os.close(self._commands)
        os.close(self._answers[0])
