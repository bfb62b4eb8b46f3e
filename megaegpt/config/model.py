"""A model's configuration: sizes, attention, positions, and the EGPT and encoder parts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megaegpt.config.paths import PathText
from megaegpt.config.ranges import (
    BatchSize,
    Fraction,
    LayerCount,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    ScaleFactor,
    TensorSize,
    TokenId,
)

VOCABULARY_MULTIPLE = 128
GATED_MULTIPLE = 64


@dataclass(frozen=True)
class EncoderConfig:
    """The frozen GPT under EGPT and DeepGPT."""

    source: PathText | None = None
    """Weights of the frozen encoder, required for egpt and deepgpt: a run's folder (its latest
    checkpoint), a checkpoint, a weights folder, or a published model: a folder in Hugging
    Face's form, a GGUF file, or its name (``gpt2``, ``smollm2-135m``, ``hf:OWNER/NAME``)."""
    layers: LayerCount | None = None
    """Blocks that are run; their output is taken as it is. None: all, then the final norm."""
    overlap: NonNegativeInt = 0
    """Tokens before each chunk, at most a chunk of them, that the encoder sees too; their states
    belong to the chunk before. It costs ``overlap / chunk_size`` of the encoder's operations."""
    initialize_decoder: bool = False
    """The decoder's blocks, final norm and head start as the encoder's last ones."""
    batch_size: BatchSize = 8
    """Chunks encoded at once when a feature store is computed."""


@dataclass(frozen=True)
class EGPTConfig:
    """How EGPT sees a long document: chunks, their features, and the extensions of the original."""

    num_chunks: TensorSize = 16
    """Chunks in a training window; a token sees at most ``num_chunks - 1`` earlier chunks."""
    chunk_size: TensorSize = 1024
    """Tokens in a chunk; at most the encoder's ``max_seq_len``."""
    local_attention: bool = False
    """Tokens of the current chunk also attend to each other causally in the decoder."""
    attention_sink: bool = False
    """With ``local_attention``: they also attend to a learned token before their chunk, which
    starts as the encoder's state of a text's first token. Attention that has nothing to say rests
    on it (Xiao et al., arXiv 2309.17453), and over an encoder with an overlap no chunk holds it."""
    memory_gate: bool = False
    """A learned, zero-initialised gate per head on what is read of earlier chunks' features."""
    history: bool = True
    """Earlier chunks are seen. false: the same model over the same windows without its memory."""
    token_memory: bool = False
    """Each token leaves a key of its encoder state and the token behind it;
    what followed similar states, in its own chunk too, is mixed into the prediction."""
    memory_dim: TensorSize = 64
    """Numbers in a key of the token memory."""
    memory_pointers: TensorSize = 1
    """Pointers into the token memory, each with projections and a share of its own."""
    memory_chunks: TensorSize | None = None
    """Earlier chunks whose keys a token is compared with, those of the highest mean score; None:
    all."""
    adapter_residual: bool = False
    """States are added to the output of the MLP that they go through first; it and the chunk and
    length tables start at zero, so that the decoder's input starts as the encoder's output."""


@dataclass(frozen=True)
class RopeScalingConfig:
    """How rotary frequencies are changed for texts longer than those a model was trained on."""

    kind: Literal["none", "linear", "ntk", "yarn", "llama3"] = "none"
    """``linear``: all of them divided by the factor (Chen et al., arXiv 2306.15595); ``ntk``: a
    larger base, so that the slowest one is; ``yarn``: slow ones divided, fast ones kept, a ramp
    between them (Peng et al., arXiv 2309.00071); ``llama3``: the same by wavelength, as Llama 3.1
    has it."""
    factor: ScaleFactor = 1.0
    """How many times longer texts become."""
    original_max_seq_len: TensorSize | None = None
    """yarn, llama3: the length trained before scaling. None: ``max_seq_len / factor``."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above the original length divided by this are scaled in full."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below the original length divided by this are kept."""
    beta_fast: PositiveFloat = 32.0
    """yarn: frequencies that turn more often over the original length are kept."""
    beta_slow: PositiveFloat = 1.0
    """yarn: frequencies that turn less often over the original length are scaled in full."""
    attention_factor: PositiveFloat | None = None
    """yarn: factor on the rotated queries and keys. None: ``0.1 ln(factor) + 1``."""


@dataclass(frozen=True)
class ModelConfig:
    """A GPT, or the trainable decoder of EGPT or DeepGPT (then sizes are the decoder's)."""

    kind: Literal["gpt", "egpt", "deepgpt"] = "gpt"
    """Which model: a GPT, EGPT (frozen encoder, history features), or DeepGPT (its baseline)."""
    vocab_size: TensorSize = 50257
    """Tokens of the tokenizer; weights have ``padded_vocab_size`` rows."""
    max_seq_len: TensorSize = 1024
    """Longest sequence a GPT sees (rows of its learned position table)."""
    hidden_size: TensorSize = 768
    """Width of the residual stream; for egpt and deepgpt it must be the encoder's."""
    num_layers: LayerCount = 12
    """Transformer blocks."""
    num_heads: TensorSize = 12
    """Query heads; divisible by the tensor-parallel size."""
    num_kv_heads: TensorSize | None = None
    """Key/value heads: None means ``num_heads`` (multi-head); 1 is multi-query."""
    head_dim: TensorSize | None = None
    """Width of a head; None means ``hidden_size / num_heads``."""
    ffn_hidden_size: TensorSize | None = None
    """Width inside the MLP; None means ``4 * hidden_size``, or a gated MLP's 8/3 of it, up to a
    multiple of 64."""
    attention: Literal["grouped_query", "latent"] = "grouped_query"
    """``grouped_query`` covers multi-head, grouped- and multi-query; ``latent`` is MLA."""
    positions: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"
    """How a token knows where it is."""
    rope_base: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    rope_fraction: Probability = 1.0
    """Share of a head's width that is rotated, from its start; the rest knows no position."""
    rope_pairs: Literal["halves", "interleaved"] = "halves"
    """Columns that are rotated together: columns i and i + half of the width (GPT-NeoX, Llama in
    Hugging Face's form), or 2i and 2i + 1 (GPT-J, Llama as Meta publishes it).
    """
    rope_scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)
    """Rotary frequencies beyond the trained length."""
    window: PositiveInt | None = None
    """Sliding window: a token sees itself and the ``window - 1`` tokens before it. None: all."""
    window_every: PositiveInt | None = None
    """Every n-th layer stays global (layers n-1, 2n-1, ...). None: every layer has the window."""
    latent_dim: TensorSize | None = None
    """Latent attention: width of the cached key/value latent. None means ``hidden_size / 8``."""
    query_latent_dim: TensorSize | None = None
    """Latent attention: width of the query latent. None: queries are projected directly."""
    latent_norm: bool = True
    """Latent attention: RMSNorm on the latents, as DeepSeek-V2 has it; false: its simple form."""
    rope_head_dim: TensorSize | None = None
    """Latent attention with rotary positions: width of the decoupled rotary part of a head."""
    document_end: TokenId | None = None
    """Token that ends a document inside a packed sample (50256 for GPT-2): attention and positions
    start anew after it. None: documents flow into each other."""
    dropout: Fraction = 0.0
    """Probability, for attention weights, block outputs and embeddings alike."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Biases of the query, key and value projections (Qwen2 has no others). None: as ``bias``."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """RMSNorm of queries and keys before their rotation: over each head (Qwen3), or over all heads
    together (OLMo 2)."""
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    """The norm of blocks and of their output: GPT-2's LayerNorm or Llama's RMSNorm."""
    norm_placement: Literal["pre", "post"] = "pre"
    """``pre``: x + f(norm(x)); ``post``: x + norm(f(x)), as OLMo 2 has it."""
    mlp: Literal["gelu", "swiglu", "geglu"] = "gelu"
    """GPT-2's MLP, or a gated one (Shazeer, arXiv 2002.05202): Llama's with SiLU, or with GELU."""
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    """GELU of the MLP: GPT-2's tanh approximation, or the exact one."""
    tied_embeddings: bool = True
    """The output head is the token embedding (gpt only; egpt and deepgpt have their own head)."""
    logit_softcap: PositiveFloat | None = None
    """Logits become ``cap * tanh(logits / cap)``, as Gemma 2 has it. None: they stay."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the squared log of the softmax's sum (Chowdhery et al., arXiv 2204.02311, section
    5). It is in the gradients; losses are shown without it."""
    layer_norm_eps: PositiveFloat = 1e-5
    """Added to the variance in LayerNorm, or to the mean square in RMSNorm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of initial weights; residual outputs are scaled by 1/sqrt(2 layers)."""
    egpt: EGPTConfig = field(default_factory=EGPTConfig)
    """Chunks and features (egpt; deepgpt reads num_chunks and chunk_size)."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The frozen encoder (egpt and deepgpt)."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head: a multiple of 128, whatever the TP size."""
        return -(-self.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE

    @property
    def kv_heads(self) -> int:
        """Key/value heads with the default resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Head width with the default resolved."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def ffn_size(self) -> int:
        """MLP width with the default resolved."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.has_gated_mlp:  # three matrices of this width have the size of two of 4 C
            return -(-8 * self.hidden_size // (3 * GATED_MULTIPLE)) * GATED_MULTIPLE
        return 4 * self.hidden_size

    @property
    def has_gated_mlp(self) -> bool:
        """Whether the MLP has a gate beside its up-projection."""
        return self.mlp != "gelu"

    @property
    def has_qkv_bias(self) -> bool:
        """Biases of the query, key and value projections with the default resolved."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def rope_size(self) -> int:
        """Columns of a head that are rotated: an even number (``model_rules`` checks it)."""
        if self.attention == "latent":
            return self.rope_head_dim or 0
        return int(self.head_size * self.rope_fraction + 1e-6)  # 0.58 of 100 is 57.99999999999999

    @property
    def rope_original_length(self) -> float | None:
        """The length trained before scaling, with the default resolved; None where no frequency
        depends on it.
        """
        scaling = self.rope_scaling
        if self.positions != "rotary" or scaling.kind not in ("yarn", "llama3"):
            return None
        return float(scaling.original_max_seq_len or self.max_seq_len / scaling.factor)

    @property
    def latent_size(self) -> int:
        """Latent width with the default resolved."""
        return self.hidden_size // 8 if self.latent_dim is None else self.latent_dim

    @property
    def needs_encoder(self) -> bool:
        """Whether it reads the states of a frozen encoder, chunk by chunk, and not tokens."""
        return self.kind != "gpt"

    @property
    def has_history(self) -> bool:
        """Whether it reads features of earlier chunks."""
        return self.kind == "egpt" and self.egpt.history and self.egpt.num_chunks > 1

    @property
    def has_token_memory(self) -> bool:
        """Whether tokens of earlier chunks leave keys."""
        return self.kind == "egpt" and self.egpt.token_memory

    @property
    def preceding_tokens(self) -> int:
        """Tokens before a window that the model is told: those that its encoder sees too, and at
        least the one that a token memory compares.
        """
        if not self.needs_encoder:
            return 0
        return max(self.encoder.overlap, int(self.has_token_memory))

    @property
    def chunks_per_sample(self) -> int:
        """Chunks of a training sample; 1 for a gpt."""
        return self.egpt.num_chunks if self.needs_encoder else 1

    @property
    def length_multiple(self) -> int:
        """Number that divides the length of every text the model is called on."""
        return self.egpt.chunk_size if self.needs_encoder else 1

    @property
    def residual_std(self) -> float:
        """Standard deviation of initial weights that write to the residual stream, which is done
        twice a layer (Radford et al., 2019, section 2.3)."""
        return self.init_std / (2 * self.num_layers) ** 0.5

    @property
    def sample_len(self) -> int:
        """Tokens predicted in one training sample: a sequence, or a whole window of chunks."""
        if self.kind == "gpt":
            return self.max_seq_len
        return self.egpt.num_chunks * self.egpt.chunk_size
