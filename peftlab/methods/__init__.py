"""The methods, one file each. A new one is a file and a line in `METHODS`; DESIGN.md shows how each fits."""

from peftlab.methods.adapter import PLACEMENTS, AdapterConfig
from peftlab.methods.bitfit import BitFitConfig, SelectiveConfig
from peftlab.methods.ia3 import IA3Config
from peftlab.methods.lora import LoRAConfig
from peftlab.methods.p_tuning import PTuningConfig
from peftlab.methods.prefix_tuning import PrefixTuningConfig
from peftlab.methods.prompt_tuning import PromptTuningConfig

# The method's name on the command line, and its config; `config.peft_type` is its name in Hugging Face's files.
METHODS = {
    "lora": LoRAConfig,
    "prompt": PromptTuningConfig,
    "p-tuning": PTuningConfig,
    "prefix": PrefixTuningConfig,
    "ia3": IA3Config,
    "bitfit": BitFitConfig,
    "selective": SelectiveConfig,
    **dict.fromkeys(PLACEMENTS, AdapterConfig),
}
