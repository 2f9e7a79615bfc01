"""Opens a page in Chromium's engine (Qt WebEngine, no screen) and says what it saw. A program, run by a test.

    python -m tests.browser SCHEME < [{"page": path, "javascript": bool, "width": px, "picture": path or ""}, ...]

SCHEME is ``light`` or ``dark``: what the reader's system asks of pages; fixed when the engine starts, hence one program
run a scheme. Prints a JSON list with, for each page, the addresses it asked for, its console's messages and what
``FACTS`` measured. The measuring script runs in a world of its own, also where the page's own scripts are off.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

HEIGHT = 900
#: A page that has not loaded by then is reported as not loaded.
DEADLINE_MS = 30_000
SCHEMES = {"dark": 0, "light": 1}  # blink's preferredColorScheme

#: What is measured in the page, as JSON text. Contrast as WCAG 2.2 defines it.
FACTS = """
(() => {
  for (const d of document.querySelectorAll('details')) d.open = true;
  const parsed = c => c.match(/[\\d.]+/g).map(Number);
  const part = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = c => { const [r, g, b] = parsed(c); return .2126 * part(r) + .7152 * part(g) + .0722 * part(b); };
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor, p = parsed(c);
    if (p.length < 4 || p[3] === 1) return c; } return 'rgb(255, 255, 255)'; };
  const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
    return (x + .05) / (y + .05); };
  const seen = e => { const r = e.getBoundingClientRect(); return r.width > 0 && r.height > 0; };
  const words = [...document.body.querySelectorAll('*')].filter(e => seen(e) && !e.closest('style, script, title') &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
  const ink = e => e.ownerSVGElement ? getComputedStyle(e).fill : getComputedStyle(e).color;
  const scale = e => { const s = e.ownerSVGElement;
    return s ? s.getBoundingClientRect().width / s.viewBox.baseVal.width : 1; };
  const faint = words.map(e => [contrast(ink(e), behind(e)), e.textContent.slice(0, 40)])
    .sort((p, q) => p[0] - q[0])[0];
  const small = words.map(e => [parseFloat(getComputedStyle(e).fontSize) * scale(e), e.textContent.slice(0, 40)])
    .sort((p, q) => p[0] - q[0])[0];
  const pale = [...document.querySelectorAll('svg circle')].filter(seen)
    .map(e => [contrast(getComputedStyle(e).fill, behind(e)), getComputedStyle(e).fill]).sort((p, q) => p[0] - q[0])[0];
  const cut = words.filter(e => e.ownerSVGElement && !(r => { const s = e.ownerSVGElement.getBoundingClientRect();
    return r.left >= s.left - 1 && r.right <= s.right + 1 && r.top >= s.top - 1 && r.bottom <= s.bottom + 1;
  })(e.getBoundingClientRect())).map(e => e.textContent);
  return JSON.stringify({
    title: document.title,
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
    background: luminance(behind(document.body)),
    wide: document.documentElement.scrollWidth,
    room: document.documentElement.clientWidth,
    sections: [...document.querySelectorAll('section')].map(e => e.id),
    tables: [...document.querySelectorAll('table')].filter(seen).length,
    rows: [...document.querySelectorAll('#records tbody tr')].filter(seen).length,
    plots: [...document.querySelectorAll('svg')].filter(seen).length,
    points: [...document.querySelectorAll('svg circle')].filter(seen).length,
    dead: [...document.querySelectorAll('a')].filter(a => { const h = a.getAttribute('href');
      return !h || !h.startsWith('#') || !document.getElementById(h.slice(1)); }).length,
    faint: faint || null, pale: pale || null, small: small || null, cut: cut,
  });
})()
"""


def main() -> None:
    scheme = SCHEMES[sys.argv[1]]
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    # Without the sandbox it starts as root too; our pages are our own.
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
        f"--no-sandbox --disable-gpu --blink-settings=preferredColorScheme={scheme}"
    )
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineProfile,
        QWebEngineScript,
        QWebEngineSettings,
        QWebEngineUrlRequestInterceptor,
    )
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    asked: list[str] = []
    said: list[str] = []

    class Requests(QWebEngineUrlRequestInterceptor):  # type: ignore[misc]  # its types are not installed
        def interceptRequest(self, info: Any) -> None:
            asked.append(info.requestUrl().toString())

    class Page(QWebEnginePage):  # type: ignore[misc]  # its types are not installed
        def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
            said.append(f"{message} (line {line})")

    application = QApplication(["browser"])
    profile = QWebEngineProfile()  # without a name: nothing is kept on disk
    interceptor = Requests()
    profile.setUrlRequestInterceptor(interceptor)
    view = QWebEngineView()
    page = Page(profile, view)
    attributes = QWebEngineSettings.WebAttribute
    # A page from a file may ask for what is elsewhere: else a request would be refused before it could be seen.
    page.settings().setAttribute(attributes.LocalContentCanAccessRemoteUrls, True)
    view.setPage(page)
    found: list[dict[str, Any]] = []
    jobs = json.load(sys.stdin)

    def begin() -> None:
        if len(found) == len(jobs):
            application.quit()
            return
        job = jobs[len(found)]
        asked.clear()
        said.clear()
        page.settings().setAttribute(attributes.JavascriptEnabled, job["javascript"])
        view.resize(job["width"], HEIGHT)
        view.show()
        page.load(QUrl(Path(job["page"]).resolve().as_uri()))

    def loaded(ok: bool) -> None:
        if not ok:
            end({})
        else:
            world = QWebEngineScript.ScriptWorldId.ApplicationWorld.value
            page.runJavaScript(FACTS, world, lambda text: end(json.loads(text) if text else {}))

    def end(facts: dict[str, Any]) -> None:
        picture = jobs[len(found)]["picture"]
        found.append({"asked": list(asked), "said": list(said), "facts": facts})
        if picture:
            view.grab().save(picture)
        begin()

    page.loadFinished.connect(loaded)
    QTimer.singleShot(DEADLINE_MS, application.quit)
    QTimer.singleShot(0, begin)
    application.exec()
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # Qt's own end of a page and its profile depends on the order in which Python frees them


if __name__ == "__main__":
    main()
