"""Small chat templates of the families that people use, written for these tests, and a tokenizer that knows them."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|bot|>", "<|head|>", "<|/head|>", "<|eot|>", "[INST]",
           "[/INST]", "[CALL]", "<bos>", "<turn>", "</turn>", "<|end|>", "<|endoftext|>", "<|U|>", "<|A|>"]  # fmt: skip
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>"]  # tokens, but not special ones, as in Qwen
CORPUS = (
    "the cat runs and the dog sleeps. system user assistant model tool hello Hello world yes no what is two and two? "
    "four five red green blue ### Instruction: ### Response: USER: ASSISTANT: I think it is so. be short you are kind "
)

CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# as CHATML, without a way to open an answer
UNOPENED = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}"""

# ChatML whose last answers keep their thinking, and earlier ones lose it; with tools, in a user's turn
THINKING = """{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{% for t in tools %}{{ t | tojson }}\
{% endfor %}
<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user
{{ m.content }}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>{{ m.content }}</tool_response><|im_end|>
{% elif m.role == 'assistant' %}{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}\
{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip() %}\
{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}<|im_start|>assistant
{% if loop.index0 > ns.last %}<think>
{{ thought }}
</think>

{% endif %}{{ content }}{% for c in m.tool_calls or [] %}
<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

# opens an answer with a thought, and writes none of the thoughts in its turns
OPENED_THOUGHT = """<s>{% for m in messages %}{% if m.role == 'user' %}<|U|>{{ m.content }}\
{% elif m.role == 'assistant' %}<|A|>{{ m.content.split('</think>')[-1] }}</s>{% else %}{{ m.content }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}<|A|><think>
{% endif %}"""

LLAMA = """{% for m in messages %}{% if loop.first %}<|bot|>{% endif %}<|head|>{{ m.role }}<|/head|>

{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>

{% endif %}"""

MISTRAL = """{% set rest = messages %}{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}\
{% set system = messages[0].content %}{% endif %}<s>{% for m in rest %}\
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('roles must alternate user/assistant/user/assistant') }}{% endif %}{% if m.role == 'user' %}[INST] \
{% if system is defined and (loop.last or rest | length == loop.index + 1) %}{{ system }}

{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"""

GEMMA = """<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}</turn>
{% endfor %}{% if add_generation_prompt %}<turn>model
{% endif %}"""

# a second end after the conversation
TWO_ENDS = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% else %}<|endoftext|>{% endif %}"""

MARKED = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}\
<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

VICUNA = """{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}\
ASSISTANT: {{ m.content }}</s>{% else %}{{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}\
ASSISTANT:{% endif %}"""

NO_END = """{% for m in messages %}{% if m.role == 'user' %}### Instruction:
{{ m.content }}

{% else %}### Response:
{{ m.content }}

{% endif %}{% endfor %}{% if add_generation_prompt %}### Response:
{% endif %}"""

# what it writes of one turn depends on another's content
COUNTING = """{% for m in messages %}<|im_start|>{{ m.role }} {{ messages | map(attribute='content') | join | length }}
{{ m.content }} {{ m.content | upper }}<|im_end|>
{% endfor %}"""


def tokenizer(template):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS] * 4, trainer)
    backend.add_tokens([AddedToken(one, special=False, normalized=False) for one in ADDED])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    fast.chat_template = template
    return fast
