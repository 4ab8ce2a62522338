"""Find and read a model's ``config.json``, and check every field. Does not import torch."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .models import EXPERT_BYTES, MODELS, Model, Weights

MAX_BYTES = 4 << 20
"""Larger files are refused: the released ``config.json`` files have 3 KB."""
_LIMIT = 2**31
_RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
_ARCHITECTURES = {"deepseekv4forcausallm", "deepseekv4model", "deepseekv4forcausallmnextn", "deepseekv4mtpmodel"}
_MAGIC = {b"GGUF": "a GGUF file", b"PK\x03\x04": "a zip archive", b"\x80\x02": "a pickle", b"\x1f\x8b": "a gzip file"}
_OFFICIAL = ("dim", "n_layers", "n_heads")
_LATER = re.compile(r"(kv_source|index_source|candidate|engram)_")
"""Fields of V4.1: shared indices and keys, candidate blocks and n-gram embeddings."""
_OF_WEIGHTS = {
    "vocab": "vocab_size",
    "q_lora_rank": "q_lora_rank",
    "experts": "n_routed_experts",
    "expert_width": "moe_intermediate_size",
    "experts_per_token": "num_experts_per_tok",
}
# fmt: off
_ELSEWHERE = frozenset((
    "attention_bias", "attention_dropout", "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward",
    "compress_rope_theta", "dspark_markov_rank", "dspark_noise_token_id", "dspark_target_layer_ids", "eos_token_id",
    "ep_size", "first_k_dense_replace", "hc_eps", "hc_sinkhorn_iters", "hidden_act", "id2label", "image_token_id",
    "initializer_range", "intermediate_size", "is_encoder_decoder", "label2id", "mlp_bias", "mlp_layer_types",
    "moe_layer_freq", "n_group", "norm_topk_prob", "num_local_experts", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "rms_norm_eps",
    "rope_scaling", "rope_theta", "routed_scaling_factor", "router_aux_loss_coef", "router_jitter_noise",
    "scoring_func", "seq_aux", "swiglu_limit", "tokenizer_class", "topk_group", "topk_method", "transformers_version",
    "use_cache", "video_token_id",
))
# fmt: on
"""Fields that no op depends on."""
_QUANT_ELSEWHERE = frozenset(("modules_to_not_convert", "ignored_layers", "ignore", "dequantize", "producer"))
_QUANT_READ = frozenset(("quant_method", "config_groups", "_from"))


@dataclass(frozen=True)
class Configuration:
    """A model as described by its configuration.

    Attributes:
        model: Dimensions.
        unsupported: Fields with a value that the ops do not support, each with the value and what is expected.
        notes: Fields that were not looked at, and what is unknown.
    """

    model: Model
    unsupported: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read(source: str | Path | Mapping[str, Any]) -> Configuration:
    """Read a model's configuration.

    Args:
        source: ``"flash"``, ``"pro"``, the path of a Hugging Face ``config.json`` or of the folder it is in, a folder
            ``models--*`` of the hub's cache, the id of a model that is in that cache, or the contents of a
            ``config.json``.

    Raises:
        ValueError: not a DeepSeek V4 configuration, or a field is missing or not valid; names the field.
        OSError: the file cannot be read.
    """
    if isinstance(source, Mapping):
        return _Reader("config.json", source).read()
    if isinstance(source, str) and source in MODELS:
        return Configuration(MODELS[source])
    path = locate(source)
    return _Reader(str(path), load(path), path.parent).read()


def locate(source: str | Path) -> Path:
    """The path of the ``config.json`` for a path or the id of a model.

    Raises:
        ValueError: not a path, and not a model in the hub's cache; the message says what to do.
    """
    text = os.fspath(source)
    if not text or "\0" in text:
        raise ValueError(f"model: expected a path, got {text!r}")
    path = _home(text)
    if path.is_dir():
        return _in_folder(path)
    if path.exists() or path.is_symlink():
        return path
    if re.fullmatch(r"[\w-]+", text):
        raise FileNotFoundError(f"{text}: no such file or folder; {' and '.join(MODELS)} are built in")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        if id_in := re.match(r"(?:https?://[^/]+/|hf://)?([\w-][\w.-]*/[\w.-]+)(?=[@/?#]|$)", text):
            if "://" in text or text[id_in.end() :].startswith("@"):
                raise FileNotFoundError(
                    f"{text}: the id of a model is like org/name: run `hf download {id_in[1]} config.json` and give "
                    f"{id_in[1]}, or give the path of a config.json"
                )
        elif "://" in text:
            raise FileNotFoundError(f"{text}: not a path: download the model's config.json and give its path")
        return path
    cached = _hub() / f"models--{text.replace('/', '--')}"
    if cached.is_dir():
        return _in_folder(cached)
    short = next((name for name, model in MODELS.items() if model.name == text.partition("/")[2]), None)
    built_in = f"; its dimensions are built in: {short}" if short is not None else ""
    raise FileNotFoundError(
        f"{text}: no such file, and not in the hub's cache {_hub()}: run `hf download {text} config.json`{built_in}"
    )


def _hub() -> Path:
    """The folder where huggingface_hub keeps models, by its rules."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(name):
            return _home(value)
    if value := os.environ.get("HF_HOME"):
        return _home(value) / "hub"
    return _home(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _home(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no home, or no such user
        raise ValueError(f"{text}: {error}") from None


def _in_folder(folder: Path) -> Path:
    path = folder / "config.json"
    if path.exists() or path.is_symlink():
        return path
    snapshots = folder if folder.name == "snapshots" else folder / "snapshots"
    if snapshots.is_dir():
        try:
            revision = (snapshots.parent / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            revision = ""
        found = [snapshot / "config.json" for snapshot in snapshots.iterdir() if (snapshot / "config.json").exists()]
        if found:
            return max(found, key=lambda one: (one.parent.name == revision, one.stat().st_mtime))
        raise FileNotFoundError(f"{folder}: no snapshot in it has a config.json")
    if any(folder.glob("*.gguf")):
        raise FileNotFoundError(f"{folder}: no config.json beside the GGUF files: give the original model's")
    raise FileNotFoundError(f"{folder}: no config.json in this folder")


def load(path: Path) -> dict[str, Any]:
    """The contents of a ``config.json``. Only a regular file that is not too large is read.

    Raises:
        ValueError: not a regular file, too large, or not a JSON object.
        OSError: cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a FIFO without a writer would block
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path}: expected a regular file")
    with open(descriptor, "rb") as file:
        head = file.read(9)
        kind = next((kind for magic, kind in _MAGIC.items() if head.startswith(magic)), None)
        if kind is None and head[8:] == b"{" and b"\0" in head[:8]:
            kind = "a safetensors file"
        if kind is not None:
            raise ValueError(f"{path}: not JSON, but {kind}: give the model's config.json")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{path}: expected a config.json of at most {MAX_BYTES} bytes, got {status.st_size}")
        raw = head + file.read(MAX_BYTES)
    try:
        config = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply for a config.json") from None
    except ValueError as error:  # JSONDecodeError, and an int of too many digits
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _beside(folder: Path | None) -> Mapping[str, Any] | None:
    """The quantisation file of ModelOpt or AutoGPTQ beside a ``config.json``, as a ``quantization_config``."""
    for name, method in (("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq")):
        if folder is not None and (file := folder / name).is_file():
            inner = load(file)
            nested = inner.get("quantization")
            return {"quant_method": method, **(nested if isinstance(nested, dict) else inner), "_from": name}
    return None


class _Reader:
    """Reads one configuration into a ``Configuration``."""

    def __init__(self, name: str, config: Mapping[str, Any], folder: Path | None = None) -> None:
        self.name = name
        self.config = {str(key): value for key, value in config.items()}
        self.folder = folder
        self.looked_at = {"model_type", "_name_or_path"}
        self.unsupported: list[str] = []
        self.notes: list[str] = []

    def get(self, key: str) -> Any:
        self.looked_at.add(key)
        return self.config.get(key)

    def number(self, key: str, least: int = 1) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _LIMIT:
            kind = "a positive integer" if least else "an integer of at least 0"
            kind += " below 2**31" if isinstance(value, int) and value >= _LIMIT else ""
            raise ValueError(f"{self.name}: {key}: expected {kind}, got {_short(value)}")
        return value

    def expect(self, key: str, value: Any, *expected: Any, why: str = "") -> None:
        """Note a value that the ops do not support."""
        if value not in expected or (isinstance(value, bool) and not any(value is one for one in expected)):
            given = [one for one in expected if one is not None]
            wanted = " or ".join(map(repr, given)) if given else "nothing"
            self.unsupported.append(f"{key}: expected {wanted}, got {_short(value)}{why and f': {why}'}")

    def read(self) -> Configuration:
        self.unwrap()
        if self.config.get("model_type") != "deepseek_v4":
            if all(key in self.config for key in _OFFICIAL):
                raise ValueError(f"{self.name}: this is inference/config.json; give the model's own config.json")
            got = _short(self.config.get("model_type"))
            raise ValueError(f"{self.name}: model_type: expected 'deepseek_v4', got {got}")
        for architecture in self.strings("architectures"):
            if architecture.lower() not in _ARCHITECTURES:
                self.expect("architectures", architecture, "DeepseekV4ForCausalLM")
        layers, heads, groups = (self.number(key) for key in ("num_hidden_layers", "num_attention_heads", "o_groups"))
        if heads % groups:
            raise ValueError(f"{self.name}: o_groups: expected a divisor of {heads} attention heads, got {groups}")
        ratios, speculative = self.ratios(layers), self.speculative()
        self.head()
        for key in ("torch_dtype", "dtype"):
            if (dtype := self.get(key)) is not None:
                why = "the ops take bf16 activations"
                named = dtype if isinstance(dtype, int) else str(dtype).removeprefix("torch.")
                self.expect(key, named, "bfloat16", "auto", why=why)
        for key in self.config:
            if _LATER.match(key) and self.get(key):
                self.unsupported.append(f"{key}: a field of V4.1, which the ops are not defined for")
        quantized = self.quantization()
        model = Model(
            name=_word(self.config.get("_name_or_path")) or self.name,
            hidden=self.number("hidden_size"),
            heads=heads,
            o_groups=groups,
            o_lora_rank=self.number("o_lora_rank"),
            index_heads=self.number("index_n_heads"),
            index_dim=self.number("index_head_dim"),
            index_topk=self.number("index_topk"),
            window=self.window(),
            hc_mult=self.number("hc_mult"),
            compress_ratios=ratios,
            max_positions=self.number("max_position_embeddings"),
            head_dim=self.number("head_dim"),
            speculative_layers=speculative,
            weights=self.weights(quantized),
        )
        unknown = [_word(key) for key in self.config if key not in self.looked_at | _ELSEWHERE]
        if unknown:
            self.notes.append(f"not looked at: {', '.join(sorted(unknown))}")
        return Configuration(model, (*model.unsupported, *self.unsupported), tuple(self.notes))

    def unwrap(self) -> None:
        """The text model's configuration, which a model of text and images nests in its own."""
        inner = self.config.get("text_config")
        whole = self.config.get("model_type") == "deepseek_v4" and "num_hidden_layers" in self.config
        if not isinstance(inner, Mapping) or whole:
            return
        outer = self.config
        kind = _short(outer.get("model_type"))
        self.notes.append(f"text_config: the text model of {kind} was read, and nothing else of it")
        for architecture in self.strings("architectures"):
            if re.search(r"v4[._]?1", architecture.lower()):
                self.expect("architectures", architecture, "DeepseekV4ForCausalLM")
        shared = ("quantization_config", "compression_config", "torch_dtype", "dtype", "expert_dtype", "_name_or_path")
        self.config = {key: outer[key] for key in shared if key in outer} | dict(inner)

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise ValueError(f"{self.name}: {key}: expected a list of strings, got {_short(value)}")
        return value

    def window(self) -> int:
        keys = [key for key in ("sliding_window", "window_size") if self.get(key) is not None] or ["sliding_window"]
        sizes = [self.number(key) for key in keys]
        if len(set(sizes)) > 1:
            raise ValueError(f"{self.name}: window_size: expected sliding_window's {sizes[0]}, got {sizes[1]}")
        return sizes[0]

    def ratios(self, layers: int) -> tuple[int, ...]:
        """The ratio of each layer, without the speculative layers at the end."""
        ratios, types = self.get("compress_ratios"), self.strings("layer_types")
        unknown = sorted(set(types) - set(_RATIOS))
        if unknown:
            raise ValueError(f"{self.name}: layer_types: expected {sorted(_RATIOS)}, got {_short(unknown[0])}")
        by_type = [_RATIOS[kind] for kind in types]
        if ratios is None or ratios == []:
            ratios = by_type
            if not types:
                raise ValueError(
                    f"{self.name}: expected compress_ratios or layer_types: no default matches a released model"
                )
        if not isinstance(ratios, list) or not all(isinstance(r, int) and not isinstance(r, bool) for r in ratios):
            raise ValueError(f"{self.name}: compress_ratios: expected a list of integers, got {_short(ratios)}")
        if len(ratios) < layers:
            expected = f"0, 4 or 128 for each of {layers} layers"
            raise ValueError(f"{self.name}: compress_ratios: expected {expected}, got {len(ratios)} entries")
        if any(ratios[layers:]):  # those of speculative layers are 0
            self.notes.append(
                f"compress_ratios: {len(ratios)} entries for {layers} layers; the first {layers} were read"
            )
        common = min(len(by_type), layers)
        differs = [i for i, (one, two) in enumerate(zip(by_type[:common], ratios, strict=False)) if one != two]
        if differs:
            first = differs[0]
            expected = f"what compress_ratios says, ratio {ratios[first]}"
            self.unsupported.append(f"layer_types: expected {expected}, got {types[first]!r} in layer {first}")
        rates = self.get("compress_rates")
        if rates is not None and not isinstance(rates, Mapping):
            raise ValueError(f"{self.name}: compress_rates: expected an object, got {_short(rates)}")
        named = {f"compress_rates.{kind}": (kind, rate) for kind, rate in (rates or {}).items()}
        for key, kind in (("csa", "compressed_sparse_attention"), ("hca", "heavily_compressed_attention")):
            if (rate := self.get(f"compress_rate_{key}")) is not None:
                named[f"compress_rate_{key}"] = kind, rate
        for key, (kind, rate) in named.items():
            if kind in ("compressed_sparse_attention", "heavily_compressed_attention"):
                self.expect(key, rate, _RATIOS[kind])
            elif kind in _RATIOS:
                self.expect(key, rate, 0, 1, None)
            else:
                known = " or ".join(kind for kind, ratio in _RATIOS.items() if ratio)
                self.unsupported.append(f"{_word(key)}: unknown key, expected {known}, got {_short(rate)}")
        return tuple(ratios[:layers])

    def speculative(self) -> int:
        count = 0 if self.get("num_nextn_predict_layers") is None else self.number("num_nextn_predict_layers", 0)
        if self.get("dspark_block_size"):
            block = self.number("dspark_block_size")
            self.notes.append(
                f"dspark_block_size: DSpark drafts {block} tokens a step: check with --next-n {block + 1}; the memory "
                "of its layers is not counted"
            )
        return count

    def head(self) -> None:
        """512 dimensions, the last 64 with RoPE, and one head of keys that are also the values."""
        why = "the ops and the cache are defined for 448 + 64"
        for keys, size in ((("qk_rope_head_dim", "rope_head_dim"), 64), (("qk_nope_head_dim",), 448)):
            for key in keys:
                if (value := self.get(key)) is not None:
                    self.expect(key, value, size, why=why)
        for key, size in (("v_head_dim", 512), ("num_key_value_heads", 1), ("kv_lora_rank", 512)):
            if (value := self.get(key)) is not None:
                self.expect(key, value, size)
        rope = self.get("rope_parameters")
        factors = {"partial_rotary_factor": self.get("partial_rotary_factor")}
        if isinstance(rope, Mapping):
            for name, part in {"": rope, ".main": rope.get("main"), ".compress": rope.get("compress")}.items():
                if isinstance(part, Mapping):
                    factors[f"rope_parameters{name}.partial_rotary_factor"] = part.get("partial_rotary_factor")
        for key, factor in factors.items():
            if factor is not None:
                self.expect(key, factor, 64 / 512, why=why)

    def quantization(self) -> bool:
        """Whether the linear layers are FP8. ``fp8_einsum`` takes e4m3 weights with a scale for 128 x 128."""
        key = next((key for key in ("quantization_config", "compression_config") if self.get(key) is not None), None)
        quant: Any = _beside(self.folder) if key is None else self.config[key]
        if quant is None:
            self.notes.append(
                "no quantization_config: fp8_einsum takes FP8 weights, and an engine that keeps these in bf16 does not "
                "call it"
            )
            return False
        key = key or str(quant["_from"])
        if not isinstance(quant, Mapping):
            raise ValueError(f"{self.name}: {key}: expected an object, got {_short(quant)}")
        method = quant.get("quant_method")
        if method not in ("fp8", "deepseek_v4_fp8"):
            details = [quant.get(one) for one in ("quant_algo", "format", "bits")]
            shown = ", ".join(str(one) for one in details if isinstance(one, str | int))
            why = f"{shown}; " if shown else ""
            why += "fp8_einsum takes e4m3 weights with scales for 128 x 128"
            self.expect(f"{key}.quant_method", method, "fp8", why=why)
            return False
        wanted: dict[str, tuple[Any, ...]] = {
            "weight_block_size": ([128, 128],),
            "fmt": ("e4m3", "float8_e4m3fn", None),
            "scale_fmt": ("ue8m0", "float32", "fp32", "float", None),
            "activation_scheme": ("dynamic", None),
            "kv_cache_scheme": (None,),
            "kv_cache_quant_algo": ("FP8", None),
            "quant_algo": ("FP8", "FP8_PB_WO", "FP8_BLOCK_SCALES", None),
            "bits": (8, None),
            "w_bit": (8, None),
            "num_bits": (8, None),
        }
        for one, expected in wanted.items():
            self.expect(f"{key}.{one}", quant.get(one), *expected)
        self.groups(f"{key}.config_groups", quant.get("config_groups"))
        skipped = [name for one in _QUANT_ELSEWHERE if isinstance(quant.get(one), list) for name in quant[one]]
        if any("wo_a" in str(name) or "o_a_proj" in str(name) for name in skipped):
            self.notes.append(f"{key}: the output projection is not quantised; an engine may not call fp8_einsum")
        unknown = sorted(str(one) for one in set(quant) - set(wanted) - _QUANT_ELSEWHERE - _QUANT_READ)
        if unknown:
            self.notes.append(f"not looked at: {', '.join(f'{key}.{_word(one)}' for one in unknown)}")
        return True

    def groups(self, key: str, groups: Any) -> None:
        """The groups of layers of compressed-tensors and ModelOpt, each with its own format."""
        if not isinstance(groups, Mapping):
            self.expect(key, groups, None)
            return
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                self.expect(_word(f"{key}.{name}"), group, "weights of 8 bits")
                continue
            self.expect(_word(f"{key}.{name}.weights.num_bits"), weights.get("num_bits"), 8)
            self.expect(_word(f"{key}.{name}.weights.type"), weights.get("type"), "float", None)

    def weights(self, quantized: bool) -> Weights | None:
        """What decides the size of the weights; None and a note if the configuration does not say it."""
        expert_dtype = self.get("expert_dtype")
        if expert_dtype is None:  # engines take FP4 then
            expert_dtype = "fp4" if quantized else "bf16"
        hashed, shared = self.get("num_hash_layers"), self.get("n_shared_experts")
        sizes: dict[str, Any] = {name: self.get(key) for name, key in _OF_WEIGHTS.items()}
        missing = [key for name, key in _OF_WEIGHTS.items() if sizes[name] is None]
        tied = self.get("tie_word_embeddings") is True
        if missing:
            self.notes.append(f"the weights' size is unknown: the configuration has no {', '.join(missing)}")
            return None
        if not isinstance(expert_dtype, str) or expert_dtype not in EXPERT_BYTES:
            self.notes.append(f"the weights' size is unknown: expert_dtype: unknown value {_short(expert_dtype)}")
            return None
        return Weights(
            **{name: self.number(key) for name, key in _OF_WEIGHTS.items()},
            shared_experts=1 if shared is None else self.number("n_shared_experts", 0),
            hash_layers=0 if hashed is None else self.number("num_hash_layers", 0),
            linear_dtype="fp8" if quantized else "bf16",
            expert_dtype=expert_dtype,
            tied=tied,
        )


def _short(value: object) -> str:
    """A value for a message: one line, cut if it is long."""
    try:
        text = repr(value[:200] if isinstance(value, str | list) else value)
    except (RecursionError, ValueError):  # nested deeply, or an int of too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _word(value: object) -> str:
    """A name from a file for a message; empty if it is not a name."""
    if not isinstance(value, str):
        return ""
    return value if len(value) <= 200 and value.isprintable() else _short(value)


def from_config(source: str | Path | Mapping[str, Any]) -> Model:
    """Read a model's dimensions.

    Args:
        source: What ``read`` takes: ``"flash"``, ``"pro"``, the path of a Hugging Face ``config.json`` or of
            the folder it is in, the id of a model in the hub's cache, or the contents of a ``config.json``.

    Raises:
        ValueError: not a DeepSeek V4 configuration, or one that the ops do not support; names the field.
        OSError: the file cannot be read.
    """
    found = read(source)
    if found.unsupported:
        raise ValueError(f"{found.model.name}: {'; '.join(found.unsupported)}")
    return found.model
