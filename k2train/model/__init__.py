"""The LLaMA-architecture stage, built from parallel layers."""
