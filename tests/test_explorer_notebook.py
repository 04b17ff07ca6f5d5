"""In a notebook the page stands in a frame of its own, and works there as it does in a file."""

from tiny_models import tiny_gpt2

from sae_lib.explorer import show
from sae_lib.models import load_model
from sae_lib.neuron_embeddings import neurons

TEXTS = ["the cat sings", "a dog sleeps under the moon", "king", "old river", "blue stone", "the queen runs"]


def test_in_a_browser_a_notebooks_frame_leads_from_unit_to_unit_and_back(page):
    piece = show(neurons(load_model(tiny_gpt2(), device="cpu"), 1), TEXTS, threshold=0.3, height=600)
    page.set_content(f"<!doctype html><h1>Notebook</h1>{piece}")
    frame = page.frame_locator("iframe")
    heading = frame.locator("h2").first
    heading.wait_for()
    address = page.url
    frame.locator("#number").fill("7")
    frame.locator("#number").press("Enter")
    frame.get_by_role("heading", name="Neuron 7", exact=True).wait_for()
    frame.locator("#number").fill("3")
    frame.locator("#number").press("Enter")
    frame.get_by_role("heading", name="Neuron 3", exact=True).wait_for()
    frame.locator("#back").click()
    frame.get_by_role("heading", name="Neuron 7", exact=True).wait_for()
    assert page.url == address, "the notebook stays where it is"
    assert page.locator("h1").inner_text() == "Notebook"
    assert page.errors == []
