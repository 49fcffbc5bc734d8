#!/usr/bin/env bash
# transformers gives a GGUF file's byte-level tokenizer a token that its model has no embedding for.
#
# Packages: torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 numpy==2.4.6 (all from PyPI); Python 3.11,
# CPU only.
#
# One would guess: the tokenizer of a GGUF file has the tokens that the file lists, as many as the model has embeddings.
#
# Really: transformers builds a byte-level one by its GPT-2 class, whose unknown token is <|endoftext|> unless told
# otherwise. Where the file has no such token (Llama 3's vocabulary hasn't) it is added behind the last one, as a special
# token. unk_token says None all the same. Text that holds <|endoftext|>, the mark between documents in much of what
# models are trained on, then has an id one beyond the embedding's last row; the same tokenizer, saved as tokenizer.json,
# takes it for ordinary text.
#
# Why it matters: rows with such a mark train with the original checkpoint and end in an index error with its GGUF file;
# and who makes an embedding as long as the tokenizer saves a model of another shape. Compare len(tokenizer) with the
# embedding's rows after loading.
#
# Output seen:
#   tokens in the file 261, in the tokenizer 262, unk_token None
#   "a<|endoftext|>b" from the GGUF file: ['a', '<|endoftext|>', 'b'], the highest id 261
#   from tokenizer.json: ['a', '<', '|', 'e', 'n', 'd', 'o', 'f', 't', 'e', 'x', 't', '|', '>', 'b'], the highest id 91
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 \
    transformers==5.24.0 tokenizers==0.23.3 gguf==0.19.0 numpy==2.4.6
cd "$tmp"
export HF_HUB_OFFLINE=1 HF_HOME="$tmp/hf" TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
venv/bin/python - <<'EOF'
from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

special = ["<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|user|>"]  # spelt as Llama 3's are
tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", *special]
core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[("t", "h")]))
core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
core.decoder = decoders.ByteLevel()
PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eot_id|>", pad_token="<|pad|>").save_pretrained("plain")

writer = GGUFWriter("tiny.gguf", "llama")
writer.add_vocab_size(len(tokens))
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("llama-bpe")
writer.add_token_list(tokens)
writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
writer.add_token_merges(["t h"])
writer.add_eos_token_id(tokens.index("<|eot_id|>"))
writer.add_pad_token_id(tokens.index("<|pad|>"))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()

text = "a<|endoftext|>b"
gguf = AutoTokenizer.from_pretrained(".", gguf_file="tiny.gguf")
plain = AutoTokenizer.from_pretrained("plain")
print("tokens in the file", len(tokens), end=", ")
print("in the tokenizer", len(gguf), end=", ")
print("unk_token", gguf.unk_token)
for name, tokenizer in ((f'"{text}" from the GGUF file', gguf), ("from tokenizer.json", plain)):
    ids = tokenizer(text)["input_ids"]
    print(f"{name}: {tokenizer.convert_ids_to_tokens(ids)}, the highest id {max(ids)}")
assert (len(gguf), len(plain)) == (len(tokens) + 1, len(tokens))
assert max(gguf(text)["input_ids"]) == len(tokens) > max(plain(text)["input_ids"])
EOF
