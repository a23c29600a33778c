"""x"""
from udm_grpo.config import RunConfig
def get_config(variant: str = "") -> RunConfig:
    """x"""
    c = RunConfig()
    c.rewards.options={"a":"b"}
    return c
