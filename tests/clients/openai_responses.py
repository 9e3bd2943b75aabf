"""OpenAI's client: Responses with tools and reasoning, streamed and not, and its chain of responses."""

from common import ANSWER, GREETING, QUESTION, THOUGHTS, WEATHER, base_url, held, package, run_tool

openai = package("openai")
client = openai.OpenAI(base_url=f"{base_url()}/v1", api_key="none", max_retries=0, timeout=60)
MODEL = client.models.list().data[0].id
TOOL = {"type": "function", **WEATHER, "strict": False}


def plain():
    response = client.responses.create(model=MODEL, input="hi", instructions="Be brief.", max_output_tokens=200)
    assert response.output_text == GREETING and response.status == "completed" and response.usage.output_tokens > 0
    assert response.object == "response" and response.output[-1].content[0].annotations == []
    cut = client.responses.create(model=MODEL, input=[{"role": "user", "content": "hi"}], max_output_tokens=2)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    held("a response, complete and cut off")


def streamed():
    events = list(client.responses.create(model=MODEL, input="hi", stream=True))
    kinds = [event.type for event in events]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == GREETING == events[-1].response.output_text
    for kind in (
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ):
        assert kind in kinds, (kind, kinds)
    with client.responses.stream(model=MODEL, input="hi") as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == GREETING
    held("events of a response; the client's own stream helper reads them")


def tool_loop(stream):
    messages = [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}]
    if stream:
        events = list(client.responses.create(model=MODEL, input=messages, tools=[TOOL], stream=True))
        response = events[-1].response
        parts = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
        assert "".join(parts) == done.arguments
    else:
        response = client.responses.create(model=MODEL, input=messages, tools=[TOOL])
    (call,) = [item for item in response.output if item.type == "function_call"]
    thoughts = [item for item in response.output if item.type == "reasoning"]
    said = "".join(part.text for item in thoughts for part in (item.content or item.summary))
    assert said == THOUGHTS, response.output
    result = {"type": "function_call_output", "call_id": call.call_id, "output": run_tool(call.name, call.arguments)}
    final = client.responses.create(
        model=MODEL, input=[*messages, *(item.model_dump() for item in response.output), result], tools=[TOOL]
    )
    assert final.output_text == ANSWER, final.output
    held(f"a tool is called, its result is read{', streamed' if stream else ''}")


def chain():
    first = client.responses.create(model=MODEL, input=QUESTION, tools=[TOOL])
    (call,) = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": run_tool(call.name, call.arguments)}
    try:
        second = client.responses.create(model=MODEL, input=[result], previous_response_id=first.id, tools=[TOOL])
    except openai.BadRequestError as error:
        assert error.param == "previous_response_id", error
        held("previous_response_id is refused by name")
        return
    assert second.output_text == ANSWER and second.previous_response_id == first.id
    try:
        client.responses.create(model=MODEL, input="hi", previous_response_id="resp_none")
    except (openai.NotFoundError, openai.BadRequestError):
        held("previous_response_id")
    else:
        raise AssertionError("an unknown previous_response_id was taken")


if __name__ == "__main__":
    plain(), streamed(), tool_loop(False), tool_loop(True), chain()
