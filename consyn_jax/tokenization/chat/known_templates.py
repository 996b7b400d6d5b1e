"""Add `generation` blocks to published templates, as TRL does for `assistant_only_loss`.

A template is recognised by its lines for the assistant's turns. Its other lines, such as the system
prompt, may differ. As in TRL, Qwen3's template is also changed to keep the reasoning at the
beginning of every assistant turn. The original keeps the reasoning only in the last turn. Source:
trl 1.16, `chat_templates/qwen2_5_training.jinja` and `qwen3_training.jinja`.
"""

from __future__ import annotations

import re

_TO_TOOL = r"""(\{\{- '<\|im_end\|>\\n' \}\}\s*)(\{%- elif message\.role == "tool" %\})"""
_MARKS = {
    "qwen2.5": (
        (r' or \(message\.role == "assistant" and not message\.tool_calls\) %\}', " %}"),
        (
            r"""(\{%- elif message\.role == "assistant" %\}\s*)"""
            r"""\{\{- '<\|im_start\|>' \+ message\.role \}\}\s*\{%- if message\.content %\}""",
            r"\1{{- '<|im_start|>' + message.role }}{%- generation %}"
            r"{%- if message.content or not message.tool_calls %}",
        ),
        (_TO_TOOL, r"\1{%- endgeneration %}\2"),
    ),
    "qwen3": (
        (
            r"\{%- if loop\.index0 > ns\.last_query_index %\}\s*"
            r"\{%- if loop\.last or \(not loop\.last and reasoning_content\) %\}\s*"
            r"\{\{- '<\|im_start\|>' \+ message\.role \+ '\\n(<think>.*?) \}\}.*?"
            r"(?=\{%- if message\.tool_calls %\})",
            r"{{- '<|im_start|>' + message.role + '\\n' }}{%- generation %}{{- '\1 }}",
        ),
        (_TO_TOOL, r"\1{%- endgeneration %}\2"),
    ),
}


def marked(source: str) -> str:
    """Add `generation` blocks to a known template; return other templates unchanged."""
    for changes in _MARKS.values():
        text = source
        for pattern, put in changes:
            text, count = re.subn(pattern, put, text, flags=re.DOTALL)
            if count != 1:
                break
        else:
            return text
    return source
