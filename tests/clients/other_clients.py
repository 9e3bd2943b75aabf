"""litellm, langchain-openai and instructor: a chat, a tool, a schema; one is named as the second argument."""

import json
import sys

from common import GREETING, QUESTION, TOOL, base_url, held, package, run_tool

HI = [{"role": "user", "content": "hi"}]
ASK = [{"role": "user", "content": QUESTION}]


def use_litellm():
    litellm = package("litellm")
    fields = {"model": "openai/base", "api_base": f"{base_url()}/v1", "api_key": "none", "num_retries": 0}
    assert litellm.completion(messages=HI, **fields).choices[0].message.content == GREETING
    chunks = list(litellm.completion(messages=HI, stream=True, **fields))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == GREETING
    (call,) = litellm.completion(messages=ASK, tools=[TOOL], **fields).choices[0].message.tool_calls
    run_tool(call.function.name, call.function.arguments)
    built = litellm.stream_chunk_builder(list(litellm.completion(messages=ASK, tools=[TOOL], stream=True, **fields)))
    (call,) = built.choices[0].message.tool_calls
    run_tool(call.function.name, call.function.arguments)
    fields = {"model": "anthropic/base", "api_base": base_url(), "api_key": "none", "num_retries": 0}
    reply = litellm.completion(messages=ASK, tools=[TOOL], max_tokens=300, **fields).choices[0]
    run_tool(reply.message.tool_calls[0].function.name, reply.message.tool_calls[0].function.arguments)
    held("litellm: chat, stream, tools, and Anthropic's door")


def use_langchain():
    langchain_openai, pydantic = package("langchain_openai"), package("pydantic")

    class weather(pydantic.BaseModel):  # the tool's name
        """The temperature in a city."""

        city: str

    for use_responses_api in (False, True):
        chat = langchain_openai.ChatOpenAI(
            model="base",
            base_url=f"{base_url()}/v1",
            api_key="none",
            max_retries=0,
            use_responses_api=use_responses_api,
        )
        text = lambda message: message.text if isinstance(message.text, str) else message.text()
        assert text(chat.invoke("hi")) == GREETING
        assert "".join(text(chunk) for chunk in chat.stream("hi")) == GREETING
        (call,) = chat.bind_tools([weather]).invoke(QUESTION).tool_calls
        run_tool(call["name"], call["args"])
        whole = None
        for chunk in chat.bind_tools([weather]).stream(QUESTION):
            whole = chunk if whole is None else whole + chunk
        run_tool(whole.tool_calls[0]["name"], whole.tool_calls[0]["args"])
    held("langchain-openai: chat, stream, tools, over chat completions and Responses")


def use_instructor():
    """Against a model that guides its replies: what it says must have the schema."""
    instructor, openai, pydantic = package("instructor"), package("openai"), package("pydantic")

    class Size(pydantic.BaseModel):
        is_large: bool
        is_blue: bool

    client = openai.OpenAI(base_url=f"{base_url()}/v1", api_key="none", max_retries=0, timeout=120)
    model = client.models.list().data[0].id
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS_STRICT):
        patched = instructor.from_openai(client, mode=mode)
        size = patched.chat.completions.create(
            model=model, messages=ASK, response_model=Size, max_retries=0, max_tokens=200
        )
        assert isinstance(size, Size)
        held(f"instructor, {mode.name}: {json.dumps(size.model_dump())}")


if __name__ == "__main__":
    {"litellm": use_litellm, "langchain": use_langchain, "instructor": use_instructor}[sys.argv[2]]()
