"""Writes tests/data/templates.json: what transformers makes of tests/data/templates/*.jinja, and more.

    pip install transformers==5.23.0 jinja2==3.1.6 tokenizers==0.23.3 && python template_golden.py

- "templates": each template with each of some conversations of scripts/template_parity.py, by
  `apply_chat_template`; a text, or null where it is refused; with the byte ranges of marked answers.
- "expressions": single expressions and small templates, by the same function.
- "folders": the files of a model folder, and the `special_tokens_map` and `chat_template` that
  transformers reads from it.

Run again, it writes the same bytes.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2] / "scripts"))

import template_parity as parity
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CONVERSATIONS = [
    "one question, prompt", "answered", "answered, prompt", "system, turns", "white space", "hostile",
    "unicode", "two questions", "two answers", "system last", "unknown role", "no messages", "no content",
    "null content", "number as content", "parts everywhere", "image part", "tools, system", "no tools",
    "tools, used, system", "tools, answered, asked", "two calls, answered", "call without content",
    "arguments as text", "nested arguments", "call without id", "bare call",
    "object as answer of a tool", "tool without parameters", "builtin tools",
    "tools in the user's message", "documents", "own date", "own token", "thinking off", "reasoning",
    "reasoning by other names", "reasoning in content", "reasoning and call", "continued, white space",
    "continued, line end", "continued, parts", "continued and prompted", "continued question",
]

VARIABLES = {
    "v": "var", "num": 7, "lst": [3, 1, 2], "nul": None, "flt": 1e22, "small": 1e-05, "empty": "",
    "s": "they're bill's  friends-of", "d": {"b": 2, "a": 1, "C": 3}, "uni": "\u2028\x1f a \x1f\u00a0",
    "words": "  a b  c  ", "deep": {"items": [1, {"x": 0.1}], "keys": "k", "n": None},
}
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "Hé 'llo\n\"x\" <b>&"},
    {"role": "assistant", "content": [{"type": "text", "text": "A"}, {"type": "image"}], "n": 3, "t": True},
    {"role": "user", "content": ""},
]


def expressions():
    for line in (HERE / "data/templates/expressions.txt").read_text(encoding="utf-8").split("\n"):
        if line and not line.startswith("#"):
            yield "{{ " + line + " }}"
    yield from (HERE / "data/templates/blocks.txt").read_text(encoding="utf-8").split("\n=====\n")


FOLDERS = [
    {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "add_bos_token": True, "model_max_length": 8, "image_token": "<img>", "chat_template": "one"}},
    {"tokenizer_config.json": {"bos_token": "<s>", "unk_token": None, "extra_special_tokens": {"boi_token": "<boi>"}}, "special_tokens_map.json": {"bos_token": {"content": "<b>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}, "eos_token": "<e>", "pad_token": "<p>", "additional_special_tokens": ["<x>"]}},
    {"tokenizer_config.json": {"bos_token": "<s>", "added_tokens_decoder": {}}, "special_tokens_map.json": {"bos_token": "<b>", "eos_token": "<e>"}},
    {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}, "special_tokens_map.json": {"bos_token": None}},
    {"special_tokens_map.json": {"cls_token": "[CLS]", "mask_token": "[MASK]", "sep_token": "[SEP]"}},
    {"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}},
    {"tokenizer_config.json": {"chat_template": "config"}, "chat_template.jinja": "file\r\n"},
    {"tokenizer_config.json": {"chat_template": "config"}, "chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "rag", "additional_chat_templates/notes.txt": "no"},
    {"tokenizer_config.json": {"chat_template": "config"}, "additional_chat_templates/rag.jinja": "rag"},
]


def read_folder(files):
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
        vocabulary.save(f"{folder}/tokenizer.json")
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(exist_ok=True)
            text = content if isinstance(content, str) else json.dumps(content)
            path.write_bytes(text.encode())
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        templates = tokenizer.chat_template or {}
        if isinstance(templates, str):
            templates = {"default": templates}
        return {"files": files, "tokens": tokenizer.special_tokens_map, "templates": templates}


def main():
    parity.hugging_face.datetime = parity.FixedClock
    vocabulary = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, **parity.TOKENS)
    cases = {name: (messages, options) for name, messages, options in parity.conversations()}

    conversations = [
        {"name": name, "messages": cases[name][0], "options": {**cases[name][1], "date": parity.DATE}}
        for name in CONVERSATIONS
    ]
    templates = {}
    for path in sorted((HERE / "data/templates").glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        marked = re.search(r"\{%-?\s*generation", template)
        found = []
        for name in CONVERSATIONS:
            messages, options = cases[name]
            text = parity.by_transformers(tokenizer, template, messages, options).get("text")
            if text is not None and marked and "continue_final_message" not in options:
                text = {"text": text, "answers": parity.answers_by_transformers(template, messages, options)}
            found.append(text)
        templates[path.name] = found

    found = []
    for template in expressions():
        options = {"variables": VARIABLES}
        text = parity.by_transformers(tokenizer, template, MESSAGES, options).get("text")
        found.append([template, text])

    golden = {
        "tokens": parity.TOKENS,
        "conversations": conversations,
        "templates": templates,
        "expressions": {"messages": MESSAGES, "options": {"variables": VARIABLES, "date": parity.DATE}, "found": found},
        "folders": [read_folder(files) for files in FOLDERS],
    }
    text = json.dumps(golden, ensure_ascii=True, indent=1)
    (HERE / "data/templates.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
