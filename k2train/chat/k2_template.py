"""K2-Chat's template: four markers around the system prompt, the questions and the responses.

    {system}<|endofsystemprompt|><|beginofuser|>{user}<|beginofsystem|>{response}</s>...<|endofchat|>

- The markers are special tokens behind those of the base: 32018 to 32021 for K2. What K2's card
  calls `<|endoftext|>` is the token that ends a document, `</s>`.
- Nothing is between the parts. K2's card shows line breaks there; the public code that made ids for
  K2-Chat puts none.
- Without a system prompt a conversation begins with `<|beginofuser|>`.
- Learned are the responses, each with the `</s>` that ends it. `<|endofchat|>` is not learned, as
  in the public code. After `</s>` comes a question or the end, and questions are not learned: a
  model that learned the end would expect it after each response.
"""

CHAT_MARKERS = ("<|endofsystemprompt|>", "<|beginofuser|>", "<|beginofsystem|>", "<|endofchat|>")
"""In the order of their ids."""

K2_TEMPLATE = """\
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] + '<|endofsystemprompt|>' }}
    {%- elif message['role'] == 'user' %}
        {{- '<|beginofuser|>' + message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|beginofsystem|>' }}
        {%- generation %}
            {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- raise_exception('the role must be system, user or assistant') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|beginofsystem|>' }}
{%- else %}
    {{- '<|endofchat|>' }}
{%- endif %}
"""
"""Jinja for messages with `role` and `content`; transformers renders it to the same text."""
