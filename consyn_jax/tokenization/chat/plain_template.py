"""The chat template for models without one; its role markers are plain text."""

PLAIN = """\
{%- if bos_token is defined and bos_token and bos_token != eos_token %}{{- bos_token }}{% endif %}
{%- if tools %}
    {{- '<|tools|>' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- eos_token }}
{%- endif %}
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<tool_call>' + {'name': call.name, 'arguments': call.arguments} | tojson }}
        {%- endfor %}
        {{- eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- (message.content or '') + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
