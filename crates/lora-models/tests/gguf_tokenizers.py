"""Writes tests/data/tokenizers: small vocabularies in GGUF files, and what Hugging Face makes of texts.

    pip install gguf==0.19.0 tokenizers==0.23.3 transformers==5.23.0 sentencepiece==0.2.3 protobuf regex
    python gguf_tokenizers.py

The byte-level tokenizers cut text as the tokenizer.json files of the named models do (Llama 3, Qwen2, SmolLM,
GPT-2), the one called "default" with the expressions of llama.cpp's llama-vocab.cpp. Their vocabulary is
trained on text that is not cut, so that it has tokens across every border at which they cut. The vocabulary
called "llama" is trained by SentencePiece with Llama 2's options. ids.json has the
texts and, for each file, their ids, the ids of the text WHOLE with what goes around a text, and the ids as
text again. Run again, it writes the same bytes.
"""

import json
from io import BytesIO
from pathlib import Path

import regex
import sentencepiece
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import LlamaTokenizer, Qwen2Tokenizer
from transformers.tokenization_utils_base import generate_merges

DATA = Path(__file__).parent / "data/tokenizers"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"

# Control tokens, one that is text to the model, and one for a row of the embedding without a token.
BOS, EOS, TURN, USER_DEFINED, UNUSED = "<|begin|>", "<|end|>", "<|turn|>", "<think>", "[PAD]"

WHOLE = 1
TEXTS = [
    "",
    "a",
    " ",
    "  ",
    "       ",
    "\n",
    "\r\n\r\n",
    "The quick brown fox jumps over the lazy dog.",
    " A leading space, and a trailing one ",
    "   three leading   and\tmany \t inner     spaces\n\n   ",
    "Windows\r\nline\r\n\r\nends\r\n  and indented\r\n",
    "I'm, you're, he'll, she'd, it's, we've, don't, 'tis, I'M, YOU'RE, HE'LL, SHE'D, IT'S, WE'VE, DON'T",
    "rock’n’roll ‘quoted’ “double” 'single' \"plain\" ''",
    "x'ſ x'ſx",
    "0 7 42 123 1234 12345 123456 1234567 3.14159 1,000,000 0x1F 2nd",
    "٣٤٥ १२३ ２０２６ Ⅷ ² ½ ① 五十",
    "naïve café, Ünïcödé: ÆØÅ ß ẞ ǅ ŋ",
    "nai\u0308ve cafe\u0301 A\u030a \u1100\u1161\u11a8 \ufb01 \u212b",
    "日本語のテキスト、中文文本。한국어 텍스트！ ไทยภาษา हिन्दी العربية עברית",
    "emoji 😀😃 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☂️ \U0001fae8",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2]}  # comment\n\n\nclass A:\n\tpass\n",
    "#include <stdio.h>\nint main(void) { printf(\"%d\\n\", 1 << 4 | 3); }",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.com $5.00 €3 50% a/b a\\b ~/.x",
    "...!!! ?!? --- *** === <<>> (((a))) [b] {c} a.b.c a-b a_b ###\n## a\n",
    "\u00a0no-break\u00a0space \u3000ideographic\u3000 zero\u200bwidth \u2028line\u2029 \x85next \x0b\x0c",
    "nul \x00 bell \x07 delete \x7f private \ue000 replaced \ufffd bom \ufeff last \U0010ffff",
    "a" * 100 + " " * 70 + "b" * 3 + "\n" * 20,
    "\u2581marked\u2581 \u2581 \u0120not a space <0x41> <0x0A>",
    "unreachable, sesquipedalian unreachable\nunreachable",
    "a||b |c <| x |> 1+2=3 x^2~5 $1 `x` 12's 12,12.12\n12 .\n,\n\n  \n\r\n \r\n x\r\n\tx",
    f"{BOS}a{EOS}",
    f"{BOS} a {EOS} {EOS}{EOS}b",
    f"{TURN}user\nHi!{EOS}\n{TURN}assistant\n{USER_DEFINED}hm{USER_DEFINED} ok.{EOS}",
    f"<|begin <|end| > {UNUSED} think> <think <thin{USER_DEFINED}k>",
    "<s>[INST] Hello [/INST] hi </s><s> [INST]  again[/INST]<unk>",
]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog doesn't mind; it's asleep, and they're late.",
    "I'm sure you're right, we've seen what he'll do and she'd know. DON'T SHOUT, IT'S LATE.",
    "In 1234 there were 12345 sheep, 42 dogs and 7 cats; in 2026 there are 1,000,000 or 3.14159 of them.",
    "A leading space and a trailing one. Many inner spaces, quoted or indented lines and line ends.",
    "def f(x):\n    return x\n\n\nclass A:\n    def g(self):\n        return self.x  # comment\n\tpass\n",
    "Windows\r\nline\r\n\r\nends\r\n  and\r\n  indented\r\n",
    "日本語のテキスト。中文文本。한국어 텍스트! naïve café Ünïcödé ไทยภาษา हिन्दी العربية",
    "emoji 😀😀 👨‍👩‍👧‍👦 👍🏽 ... !!! --- *** === ### (a) [b] {c}",
    "user assistant system Hello again, hi, ok. https://example.org/a_b user@example.com $5.00 50%",
    "a || b | c <| x |> <|x|> 1+2=3 x^2 ~5 $1 `x` 'a' \"b\" x'S x's S'S 12's 12 12,12.12\n12\r\n\r\n.\n,\n\n  \n",
]

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp applies them one after the other, to the pieces that the one before left.
DEFAULT = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"]


def byte_level(use_regex):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(pattern):
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)


# How each cuts text, what comes before, whether a word that is a token is one, and whether bos is added.
BYTE_LEVEL = {
    "gpt-2": dict(cut=byte_level(True), eos=True),
    "smollm": dict(cut=pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(True)])),
    "llama-bpe": dict(cut=pre_tokenizers.Sequence([split(LLAMA3), byte_level(False)]), ignore_merges=True, bos=None),
    "qwen2": dict(cut=Qwen2Tokenizer().backend_tokenizer.pre_tokenizer, normalizer=normalizers.NFC(), bos=False),
    "default": dict(cut=None, bos=True),
}


def default_pieces(text):
    """What the four expressions leave of a text, by another engine than the one under test."""
    pieces = [text]
    for pattern in DEFAULT:
        cut = []
        for piece in pieces:
            end = 0
            for match in regex.finditer(pattern, piece):
                cut += [piece[end : match.start()], match.group()]
                end = match.end()
            cut.append(piece[end:])
        pieces = [piece for piece in cut if piece]
    return pieces


def train():
    """A byte-level vocabulary: the control tokens first, then bytes and what merges make, then others."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = byte_level(False)
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=[BOS, EOS, TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=6,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    # A token that no merge makes; it counts only where merges may be ignored.
    for token in ["Ġunreachable", USER_DEFINED, UNUSED]:
        model["vocab"][token] = len(model["vocab"])
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def byte_level_tokenizer(vocab, merges, cut, normalizer=None, ignore_merges=False, **_):
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = cut or byte_level(False)
    tokenizer.decoder = decoders.ByteLevel()
    for token in [BOS, EOS, TURN]:
        tokenizer.add_tokens([AddedToken(token, normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken(USER_DEFINED, normalized=False, special=False)])
    return tokenizer


def around(tokenizer, bos, eos):
    """Adds what goes around every text."""
    single = " ".join(([bos] if bos else []) + ["$A"] + ([eos] if eos else []))
    special = [(token, tokenizer.token_to_id(token)) for token in [bos, eos] if token]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def write(name, tokens, types, bos, eos, add, fill):
    writer = GGUFWriter(DATA / f"{name}.gguf", "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokens.index(bos))
    writer.add_eos_token_id(tokens.index(eos))
    for key, value in add.items():
        if value is not None:
            {"bos": writer.add_add_bos_token, "eos": writer.add_add_eos_token}[key](value)
    writer.add_chat_template(TEMPLATE)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def answers(tokenizer, encode=None):
    encode = encode or (lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    ids = [encode(text) for text in TEXTS]
    decoded = [tokenizer.decode(i, skip_special_tokens=True) for i in ids]
    return {"ids": ids, "whole": tokenizer.encode(TEXTS[WHOLE]).ids, "decoded": decoded}


def by_pieces(tokenizer):
    """Encodes with `default_pieces`; the added tokens are found first, as in every other tokenizer."""
    added = "|".join(regex.escape(token) for token in [BOS, EOS, TURN, USER_DEFINED])

    def encode(text):
        ids = []
        for part in regex.split(f"({added})", text):
            if regex.fullmatch(added, part):
                ids.append(tokenizer.token_to_id(part))
            else:
                for piece in default_pieces(part):
                    ids += tokenizer.encode(piece, add_special_tokens=False).ids
        return ids

    return encode


def write_byte_level(name, vocab, merges, stages):
    tokenizer = byte_level_tokenizer(vocab, merges, **stages)
    tokens = sorted(vocab, key=vocab.get)
    kinds = {BOS: TokenType.CONTROL, EOS: TokenType.CONTROL, TURN: TokenType.CONTROL}
    kinds |= {USER_DEFINED: TokenType.USER_DEFINED, UNUSED: TokenType.UNUSED}
    types = [kinds.get(token, TokenType.NORMAL) for token in tokens]
    add = {"bos": stages.get("bos", False), "eos": stages.get("eos")}

    def fill(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(pair) for pair in merges])

    write(name, tokens, types, BOS, EOS, add, fill)
    # Of the files without the key, Llama 3's alone mean that bos is added.
    bos = name == "llama-bpe" if add["bos"] is None else add["bos"]
    around(tokenizer, BOS if bos else None, EOS if add["eos"] else None)
    return answers(tokenizer, None if stages["cut"] else by_pieces(tokenizer))


def sentence_piece():
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS * 4 for line in text.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=560,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=[TURN],
        user_defined_symbols=[USER_DEFINED],
        num_threads=1,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_sentence_piece(name, sp, space_prefix=None, merges=False):
    ids = range(sp.get_piece_size())
    tokens = [sp.id_to_piece(i) for i in ids]
    scores = [sp.get_score(i) for i in ids]
    types = []
    for i, token in enumerate(tokens):
        if sp.is_unknown(i):
            types.append(TokenType.UNKNOWN)
        elif sp.is_control(i):
            types.append(TokenType.CONTROL)
        elif sp.is_byte(i):
            types.append(TokenType.BYTE)
        else:
            types.append(TokenType.USER_DEFINED if token == USER_DEFINED else TokenType.NORMAL)

    vocab = {token: i for i, token in enumerate(tokens)}
    ranked = generate_merges(vocab, dict(zip(tokens, scores)))

    def fill(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_unk_token_id(0)
        if space_prefix is not None:
            writer.add_add_space_prefix(space_prefix)
        if merges:
            writer.add_token_merges([" ".join(pair) for pair in ranked])
        else:
            writer.add_token_scores(scores)

    write(name, tokens, types, "<s>", "</s>", {}, fill)

    llama = LlamaTokenizer(vocab=vocab, merges=ranked, unk_token="<unk>", add_prefix_space=space_prefix)
    tokenizer = llama.backend_tokenizer
    plain = [text for text in TEXTS if not text.startswith(" ") and not regex.search(r"<\||<think>|<unk>|</?s>|<0x", text)]
    newer = [tokenizer.encode(text, add_special_tokens=False).ids for text in plain]
    # The stages of Llama 2's, TinyLlama's and Mistral's tokenizer.json, which are llama.cpp's too; newer
    # files put a space at the start of a text alone, and only if it has none.
    prefix = [] if space_prefix is False else [normalizers.Prepend("▁")]
    tokenizer.normalizer = normalizers.Sequence(prefix + [normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    for i, token in enumerate(tokens):
        if types[i] in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.USER_DEFINED):
            special = types[i] != TokenType.USER_DEFINED
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special)])
    around(tokenizer, "<s>", None)
    answer = answers(tokenizer)
    # On plain text all agree, and with SentencePiece itself.
    for text, other in zip(plain, newer):
        assert other == tokenizer.encode(text, add_special_tokens=False).ids, text
        if space_prefix is not False:
            assert other == sp.encode(text), text
    return answer


DATA.mkdir(exist_ok=True)
vocab, merges = train()
out = {name: write_byte_level(name, vocab, merges, stages) for name, stages in BYTE_LEVEL.items()}
sp = sentence_piece()
out["llama"] = write_sentence_piece("llama", sp)
out["llama-no-prefix"] = write_sentence_piece("llama-no-prefix", sp, space_prefix=False)
out["llama-merges"] = write_sentence_piece("llama-merges", sp, space_prefix=True, merges=True)
lines = ",\n".join(
    f'"{name}": {{\n' + ",\n".join(f'"{part}": {json.dumps(values)}' for part, values in parts.items()) + "\n}"
    for name, parts in out.items()
)
(DATA / "ids.json").write_text(f'{{\n"texts": {json.dumps(TEXTS)},\n{lines}\n}}\n')
