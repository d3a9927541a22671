#!/usr/bin/env python3
"""Compares renderings of chat templates with those of transformers, for all templates of a folder.

    cargo build --release --example template
    scripts/template_parity.py FOLDER [--program PATH] [--show COUNT]

FOLDER holds *.jinja files. Real ones are in packages on PyPI: trl (trl/chat_templates), axolotl
(axolotl/utils/chat_templates/templates), and the source of llama-cpp-python (`pip download --no-deps
--no-binary llama-cpp-python llama-cpp-python`, vendor/llama.cpp/models/templates).

Each template renders each of the conversations below twice: by transformers' `apply_chat_template`
and by examples/template.rs. Printed is a table: how many conversations, how many of them transformers
renders and how many it refuses, and how many are equal: the same text, or refused by both. Where a
template marks answers by {% generation %}, their places are compared, too. Ends with 1 where
anything differs.

Needs transformers and jinja2 from PyPI (written with 5.23.0 and 3.1.6).
"""

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

import transformers.utils.chat_template_utils as hugging_face
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

DATE = "2026-03-07T04:05:09"
TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}


class FixedClock(datetime.datetime):
    """transformers asks the clock; the other program is told this date."""

    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(DATE)


def system(content):
    return {"role": "system", "content": content}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def call(name, arguments, id=None):
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {**function, "id": id} if id else function


def tool(content, **fields):
    return {"role": "tool", "content": content, **fields}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather at a place: \"now\" & <later>\n(Zürich, 東京, \u2028)",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town's name, 'as spelled'"},
                "days": {"type": "integer", "default": 3, "minimum": 0, "maximum": 1e16},
                "unit": {"type": "string", "enum": ["°C", "°F"], "default": None},
                "exact": {"type": "boolean", "default": True},
                "tolerance": {"type": "number", "default": 0.5, "minimum": 1e-05},
                "items": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["place"],
        },
        "return": {"type": "string", "description": "What it is like"},
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds",
        "parameters": {
            "type": "object",
            "properties": {"b": {"type": "number"}, "a": {"type": ["number", "null"]}},
            "required": ["b", "a"],
        },
    },
}
DOCUMENTS = [
    {"title": "Owls", "text": "Owls hunt at night."},
    {"title": "Küken \U0001f423", "text": "They hatch.\n"},
]


def conversations():
    """Name, messages and options of each conversation."""
    ask = [user("Where does the owl live?")]
    answered = [*ask, assistant("In the oak.")]
    turns = [*answered, user("And the fox?"), assistant("Below it."), user("Thanks!")]
    hostile = "  <|im_end|> {{ 7*7 }} {% if x %} </s> [INST] \\n \"quoted\" 'single' &amp; <b> \t\n\n"
    unicode = "ĳ ß ǅ Σίσυφος \u00a0nbsp\u200b 👩‍👩‍👧 \ufeff e\u0301 \u2028 \x1f \x85 شكرا 日本語"
    calls = [call("get_weather", {"place": "Zürich", "days": 2, "exact": False}, "abcdefghi")]
    results = [tool("12 °C, {\"rain\": false}", name="get_weather", tool_call_id="abcdefghi")]
    used = [*ask, assistant("", tool_calls=calls), *results]
    two = [call("add", {"b": 1, "a": -2.5}, "call00001"), call("add", {"b": 1e22, "a": None}, "call00002")]
    two_results = [
        tool("-1.5", name="add", tool_call_id="call00001"),
        tool("1e22", name="add", tool_call_id="call00002"),
    ]
    text = json.dumps({"place": "Zürich"}, ensure_ascii=False)
    think = "<think>\nowls...\n</think>\n\nIn the oak."
    tools = {"tools": [WEATHER, ADD]}
    prompt = {"add_generation_prompt": True}

    yield "one question", ask, {}
    yield "one question, prompt", ask, prompt
    yield "answered", answered, {}
    yield "answered, prompt", answered, prompt
    yield "system", [system("Be brief."), *ask], prompt
    yield "system, answered", [system("Be brief."), *answered], {}
    yield "empty system", [system(""), *ask], prompt
    yield "turns", turns, prompt
    yield "turns, answered", turns[:-1], {}
    yield "system, turns", [system("Be brief."), *turns], prompt
    yield "white space", [system(" \n a\n"), user("\n\n x \t"), assistant("  y \n "), user(" ")], prompt
    yield "empty question", [user("")], prompt
    yield "empty answer", [*ask, assistant("")], {}
    yield "hostile", [system(hostile), user(hostile), assistant(hostile), user(hostile)], prompt
    yield "unicode", [system(unicode), user(unicode), assistant(unicode), user(unicode)], prompt
    yield "windows line ends", [user("a\r\nb\rc\n"), assistant("d\r\n"), user("e")], prompt
    yield "many turns", [m for i in range(12) for m in (user(f"q{i}"), assistant(f"a{i}"))], {}
    # Orders that some templates refuse.
    yield "answer first", [assistant("In the oak."), *ask], prompt
    yield "two questions", [*ask, *ask], prompt
    yield "two answers", [*answered, assistant("Really.")], {}
    yield "system last", [*answered, system("Be brief.")], prompt
    yield "system alone", [system("Be brief.")], prompt
    yield "two systems", [system("Be brief."), system("Be kind."), *ask], prompt
    yield "unknown role", [*ask, {"role": "narrator", "content": "Night falls."}], prompt
    yield "developer role", [{"role": "developer", "content": "Be brief."}, *ask], prompt
    yield "no messages", [], prompt
    yield "no role", [{"content": "Hm?"}], prompt
    yield "no content", [{"role": "user"}], prompt
    yield "null content", [*ask, assistant(None), user("Well?")], prompt
    yield "number as content", [user(42)], prompt
    # Parts.
    yield "text parts", [user([{"type": "text", "text": "Where is "}, {"type": "text", "text": "it?"}])], prompt
    yield "parts everywhere", [
        system([{"type": "text", "text": "Be brief."}]),
        user([{"type": "text", "text": " Where? "}]),
        assistant([{"type": "text", "text": "There."}]),
        user([{"type": "text", "text": "Ah."}]),
    ], prompt
    yield "image part", [user([{"type": "image"}, {"type": "text", "text": "What is it?"}])], prompt
    yield "no parts", [user([])], prompt
    # Tools.
    yield "tools", ask, {**tools, **prompt}
    yield "tools, system", [system("Be brief."), *ask], {**tools, **prompt}
    yield "no tools", ask, {"tools": [], **prompt}
    yield "tools, used", used, {**tools, **prompt}
    yield "tools, used, system", [system("Be brief."), *used], {**tools, **prompt}
    yield "tools, answered", [*used, assistant("Mild.")], tools
    yield "tools, answered, asked", [*used, assistant("Mild."), user("Thanks!")], {**tools, **prompt}
    yield "used without tools", used, prompt
    yield "two calls", [*ask, assistant("", tool_calls=two), *two_results], {**tools, **prompt}
    yield "two calls, answered", [*ask, assistant("", tool_calls=two), *two_results, assistant("!")], tools
    yield "call with content", [*ask, assistant("Let me see.", tool_calls=calls), *results], {**tools, **prompt}
    yield "call without content", [*ask, {"role": "assistant", "tool_calls": calls}, *results], {**tools, **prompt}
    yield "null content and call", [*ask, assistant(None, tool_calls=calls), *results], {**tools, **prompt}
    yield "call last", used[:-1], tools
    yield "arguments as text", [*ask, assistant("", tool_calls=[call("get_weather", text, "abcdefghi")]), *results], {**tools, **prompt}
    yield "no arguments", [*ask, assistant("", tool_calls=[call("add", {}, "abcdefghi")]), *results], {**tools, **prompt}
    yield "nested arguments", [*ask, assistant("", tool_calls=[call("add", {"b": {"z": [1, "é", None], "a": {}}, "a": [True, 1.0]}, "abcdefghi")]), *results], {**tools, **prompt}
    yield "call without id", [*ask, assistant("", tool_calls=[call("add", {"b": 1})]), tool("1")], {**tools, **prompt}
    yield "bare call", [*ask, assistant("", tool_calls=[{"name": "add", "arguments": {"b": 1}}]), tool("1")], {**tools, **prompt}
    yield "no calls", [*ask, assistant("Well.", tool_calls=[]), user("?")], {**tools, **prompt}
    yield "object as answer of a tool", [*used[:-1], tool({"rain": False, "t": 1.5}, name="get_weather", tool_call_id="abcdefghi")], {**tools, **prompt}
    yield "parts as answer of a tool", [*used[:-1], tool([{"type": "text", "text": "12 °C"}], name="get_weather", tool_call_id="abcdefghi")], {**tools, **prompt}
    yield "tool first", [*results, *ask], {**tools, **prompt}
    yield "bare tools", ask, {"tools": [WEATHER["function"]], **prompt}
    yield "tool without parameters", ask, {"tools": [{"type": "function", "function": {"name": "now", "description": "The time"}}], **prompt}
    yield "tool that is no object", ask, {"tools": ["get_weather"], **prompt}
    yield "builtin tools", ask, {**tools, **prompt, "variables": {"builtin_tools": ["brave_search", "code_interpreter"]}}
    yield "tools in the user's message", [system("Be brief."), *ask], {**tools, **prompt, "variables": {"tools_in_user_message": False}}
    # Documents and variables.
    yield "documents", ask, {"documents": DOCUMENTS, **prompt}
    yield "documents and tools", [system("Be brief."), *ask], {"documents": DOCUMENTS, **tools, **prompt}
    yield "no documents", ask, {"documents": [], **prompt}
    yield "document that is no object", ask, {"documents": ["Owls"], **prompt}
    yield "own date", ask, {**prompt, "variables": {"date_string": "1 Jan 2000"}}
    yield "own token", ask, {**prompt, "variables": {"bos_token": "<start>"}}
    yield "thinking on", turns, {**prompt, "variables": {"enable_thinking": True, "thinking": True}}
    yield "thinking off", turns, {**prompt, "variables": {"enable_thinking": False, "thinking": False}}
    yield "thinking off, tools", used, {**tools, **prompt, "variables": {"enable_thinking": False}}
    yield "effort", ask, {**prompt, "variables": {"reasoning_effort": "high", "thinking_budget": 512}}
    yield "null variable", ask, {**prompt, "variables": {"enable_thinking": None, "x": [1, {"y": None}]}}
    # Reasoning.
    yield "reasoning", [*ask, assistant("In the oak.", reasoning_content="owls...")], {}
    yield "reasoning by other names", [*ask, assistant("A", thinking="hm"), user("?"), assistant("B", reasoning="ah")], {}
    yield "reasoning in content", [*ask, assistant(think), user("And the fox?")], prompt
    yield "reasoning in content, last", [*ask, assistant(think)], {}
    yield "reasoning and call", [*ask, assistant("", reasoning_content="owls...", tool_calls=calls), *results], {**tools, **prompt}
    yield "reasoning, white space", [*ask, assistant("\n\nA\n", reasoning_content="\nr \n"), user("?"), assistant("B")], {}
    # The last message goes on.
    go_on = {"continue_final_message": True}
    yield "continued", answered, go_on
    yield "continued, white space", [*ask, assistant("In the ")], go_on
    yield "continued, line end", [*ask, assistant("In the oak.\n")], go_on
    yield "continued, parts", [*ask, assistant([{"type": "text", "text": "In"}])], go_on
    yield "continued, no content", [*ask, {"role": "assistant"}], go_on
    yield "continued and prompted", answered, {**go_on, **prompt}
    yield "continued question", ask, go_on


def by_transformers(tokenizer, template, messages, options):
    """The text, or None and the reason where it is refused."""
    options = dict(options)
    variables = options.pop("variables", {})
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, **options, **variables
        )
        return {"text": text}
    except Exception as error:  # templates end in errors of many kinds
        return {"error": f"{type(error).__name__}: {error}"}


def answers_by_transformers(template, messages, options):
    """The byte ranges of the parts that the template marks."""
    options = dict(options)
    variables = options.pop("variables", {})
    plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
    [text], [ranges] = hugging_face.render_jinja_template(
        [plain], chat_template=template, return_assistant_tokens_mask=True, **options, **{**TOKENS, **variables}
    )
    byte = lambda at: len(text[:at].encode())
    return sorted([byte(start), byte(end)] for start, end in ranges)


def by_program(program, path, rows):
    tokens = [f"--token={name}={token}" for name, token in TOKENS.items()]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    command = [program, "--json", "--model", str(path), *tokens, "-"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.split("\n") if line]
    if len(answers) != len(rows):
        sys.exit(f"{path}: {len(answers)} answers to {len(rows)} conversations: {done.stderr}")
    return answers


def differing(a, b):
    """Both texts around the first difference."""
    first = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    start = max(0, first - 60)
    return a[start : first + 100], b[start : first + 100]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="holds *.jinja files")
    parser.add_argument("--program", default="target/release/examples/template", help="examples/template.rs, built")
    parser.add_argument("--show", type=int, default=3, help="how many differences to show for each template")
    options = parser.parse_args()

    templates = sorted(options.folder.glob("*.jinja"))
    if not templates:
        sys.exit(f"{options.folder}: no *.jinja files")
    hugging_face.datetime = FixedClock
    transformers_logger = __import__("logging").getLogger("transformers")
    transformers_logger.setLevel("ERROR")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")), **TOKENS)

    cases = list(conversations())
    width = max(len(path.stem) for path in templates)
    print(f"{'template':{width}}  conversations  rendered  refused  equal  answers")
    totals = [0, 0, 0, 0]
    different = 0
    for path in templates:
        template = path.read_text(encoding="utf-8")
        marks = bool(hugging_face.re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", template))
        rows = [{"messages": messages, "date": DATE, "marked": marks and not case.get("continue_final_message"), **case} for _, messages, case in cases]
        found = by_program(options.program, path, rows)
        counts = [len(cases), 0, 0, 0]
        equal_answers = 0
        marked = 0
        shown = 0
        for (name, messages, case), row, ours in zip(cases, rows, found):
            theirs = by_transformers(tokenizer, template, messages, case)
            counts[1 if "text" in theirs else 2] += 1
            same = ours.get("text") == theirs.get("text")
            counts[3] += same
            if same and row["marked"] and "text" in theirs:
                marked += 1
                expected = answers_by_transformers(template, messages, case)
                same = ours["answers"] == expected
                equal_answers += same
                if not same:
                    theirs = {**theirs, "answers": expected}
            if not same:
                different += 1
                if shown < options.show:
                    shown += 1
                    theirs, ours = differing(repr(theirs), repr(ours))
                    print(f"  {path.stem}: {name}", f"    transformers: {theirs}", f"    ours:         {ours}", sep="\n", file=sys.stderr)
        column = f"{equal_answers} of {marked}" if marks else "-"
        print(f"{path.stem:{width}}  {counts[0]:13}  {counts[1]:8}  {counts[2]:7}  {counts[3]:5}  {column}", flush=True)
        totals = [total + count for total, count in zip(totals, counts)]
    print(f"{'all ' + str(len(templates)):{width}}  {totals[0]:13}  {totals[1]:8}  {totals[2]:7}  {totals[3]:5}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
