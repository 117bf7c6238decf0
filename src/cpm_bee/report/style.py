"""The style sheet of the report, and the script that copies commands."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #22262c; --soft: #5c6570; --line: #dfe3e8;
  --grid: #cfd5dc; --c1: #2563c9; --c2: #c2410c; --good: #12703c; --bad: #b42318;
  --good-back: #e3f4ea; --bad-back: #fdeae8; --wait-back: #e6effc; --code: #f0f2f5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2126; --text: #e4e8ec; --soft: #a3adb8; --line: #323942;
    --grid: #48515c; --c1: #7db0ff; --c2: #ffa066; --good: #7ddba3; --bad: #ff9d94;
    --good-back: #173524; --bad-back: #43201d; --wait-back: #1b2f4d; --code: #262b32;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC",
    "Microsoft YaHei", "Noto Sans CJK SC", "WenQuanYi Zen Hei", sans-serif;
}
main { max-width: 1080px; margin: 0 auto; padding: 20px 16px 48px; }
header { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 10px; }
h3 { font-size: 14px; margin: 0 0 4px; font-weight: 600; }
p { margin: 6px 0; }
.soft, caption { color: var(--soft); }
.state { padding: 2px 11px; border-radius: 99px; font-weight: 600; font-size: 13px; }
.finished { background: var(--good-back); color: var(--good); }
.failed { background: var(--bad-back); color: var(--bad); }
.running, .interrupted { background: var(--wait-back); color: var(--c1); }
.wide:focus-visible, summary:focus-visible, button:focus-visible {
  outline: 2px solid var(--c2); outline-offset: 2px; }
section, .figures-top > div { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
section { padding: 15px 17px; margin-top: 16px; }
.figures-top { display: grid; gap: 10px; margin: 16px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(148px, 1fr)); }
.figures-top > div { padding: 10px 14px; }
.figures-top dt { color: var(--soft); font-size: 13px; }
.figures-top dd { margin: 0; font-size: 21px; font-weight: 600;
  font-variant-numeric: tabular-nums; }
.figures-top dd small { display: block; font-size: 12.5px; font-weight: 400; color: var(--soft); }
.charts { display: grid; gap: 18px 24px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
.key { font-size: 12.5px; font-weight: 400; color: var(--soft); margin-left: 9px;
  white-space: nowrap; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; border-radius: 2px;
  vertical-align: middle; margin-right: 5px; background: var(--key); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); white-space: nowrap; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody tr:last-child td { border-bottom: 0; }
.figures td:not(:first-child), .figures th:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.figures td:first-child { min-width: 8.5em; }
td code, li code { overflow-wrap: anywhere; }
.best { color: var(--good); font-weight: 600; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--code); border-radius: 7px; padding: 9px 12px; margin: 4px 0 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.command { position: relative; }
.command button { position: absolute; right: 6px; top: 6px; font: inherit; font-size: 12px;
  padding: 1px 9px; border: 1px solid var(--line); border-radius: 6px; cursor: pointer;
  background: var(--card); color: var(--soft); }
.command pre { padding-right: 74px; }
summary { cursor: pointer; color: var(--soft); padding: 4px 0; }
.samples { display: grid; gap: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); }
.sample { border: 1px solid var(--line); border-left: 4px solid var(--mark); border-radius: 8px;
  padding: 9px 13px; min-width: 0; }
.right { --mark: var(--good); } .wrong { --mark: var(--bad); }
.sample p, .sample td { overflow-wrap: anywhere; white-space: pre-wrap; }
.sample .record { color: var(--soft); font-size: 13px; margin: 0 0 6px; }
.mark { color: var(--mark); font-weight: 600; }
.trail { letter-spacing: 2px; font-size: 13px; white-space: normal; }
@media (max-width: 520px) { main { padding: 14px 10px 36px; } section { padding: 13px 12px; } }
@media print { button { display: none; } section { break-inside: avoid; } }
"""

SCRIPT = """
(function () {
  if (!navigator.clipboard) { return; }
  document.querySelectorAll(".command").forEach(function (box) {
    var button = box.querySelector("button");
    button.hidden = false;
    button.addEventListener("click", function () {
      navigator.clipboard.writeText(box.querySelector("code").textContent).then(function () {
        button.classList.add("done");
        button.textContent = "✓";
      });
    });
  });
})();
"""
