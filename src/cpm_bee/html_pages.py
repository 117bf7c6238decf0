"""HTML pages in two languages, of one file that needs no network.

The language switch is two radio buttons and works without the script, which only chooses the
language of the browser at first and remembers the choice. All texts that come from elsewhere go
through `escape`.
"""

from __future__ import annotations

import base64
import hashlib
import html
from typing import NamedTuple


class Text(NamedTuple):
    """A text in both languages."""

    english: str
    chinese: str


def escape(text: object) -> str:
    """A text as HTML that shows it, in an element or in a quoted attribute.

    Half of a surrogate pair, which no file can hold, becomes a question mark.
    """
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def both(english: str, chinese: str) -> str:
    """A text of our own in both languages, as HTML; the page shows one of them."""
    return f'<span class="en" lang="en">{english}</span><span class="zh" lang="zh">{chinese}</span>'


def escaped(text: Text) -> str:
    """A text in both languages as HTML; one that is the same in both is there once."""
    if text.english == text.chinese:
        return escape(text.english)
    return both(escape(text.english), escape(text.chinese))


LANGUAGE_SWITCH = (
    '<div class="languages"><label for="en">English</label><label for="zh">中文</label></div>'
)

# With the colors --line, --card, --c1 and --c2 of the page's own style.
_STYLE = """
#en:checked ~ main .zh, #zh:checked ~ main .en { display: none; }
.switch { position: absolute; opacity: 0; pointer-events: none; }
.languages { margin-left: auto; display: flex; border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; background: var(--card); }
.languages label { padding: 4px 13px; cursor: pointer; font-size: 14px; }
#en:checked ~ main label[for=en], #zh:checked ~ main label[for=zh] {
  background: var(--c1); color: var(--card); }
#en:focus-visible ~ main label[for=en], #zh:focus-visible ~ main label[for=zh] {
  outline: 2px solid var(--c2); outline-offset: 2px; }
@media print { .languages { display: none; } }
"""

_SCRIPT = """
(function () {
  var key = "cpm-bee-report-language", saved = null;
  try { saved = localStorage.getItem(key); } catch (error) { /* no storage for local files */ }
  var chosen = saved || ((navigator.language || "").indexOf("zh") === 0 ? "zh" : "en");
  function show(language) { document.documentElement.lang = language === "zh" ? "zh-CN" : "en"; }
  ["en", "zh"].forEach(function (name) {
    var radio = document.getElementById(name);
    if (name === chosen) { radio.checked = true; }
    radio.addEventListener("change", function () {
      show(name);
      try { localStorage.setItem(key, name); } catch (error) { /* not remembered */ }
    });
  });
  show(chosen);
})();
"""

# Nothing from elsewhere, and no script but ours, whatever a record contains.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; script-src 'sha256-{}'"
)

_SHELL = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<input class="switch" type="radio" name="language" id="en" checked aria-label="English">
<input class="switch" type="radio" name="language" id="zh" aria-label="中文">
<main>
{content}
</main>
<script>{script}</script>
</body>
</html>
"""


def document(title: str, content: str, *, style: str, script: str = "") -> str:
    """Returns a page.

    Args:
        title: a text, not HTML.
        content: HTML; it has `LANGUAGE_SWITCH` somewhere.
        style, script: the page's own, beside those of the switch.
    """
    script = _SCRIPT + script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return _SHELL.format(
        policy=escape(_POLICY.format(digest)),
        title=escape(title),
        style=_STYLE + style,
        script=script,
        content=content,
    )
