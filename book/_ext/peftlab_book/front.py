"""The directives of the front page.

{front-picture}   what training costs, predicted and measured; the body is its caption
{cards}           one card for each page that the body names, a line each; "chapters" stands for all of them
"""

from pathlib import Path

from docutils import nodes

from peftlab_book import describe, drawings, sketch
from peftlab_book.directives import BOOK, FACTS, RESULTS, FactsDirective


def raw(text):
    return nodes.raw("", text, format="html")


class FrontPicture(FactsDirective):
    has_content = True

    def run(self):
        self.env.note_dependency(str(Path(self.env.srcdir, RESULTS, "memory.json")))
        costs = drawings.costs()
        picture = sketch.svg(drawings.cost(costs), *drawings.COST, drawings.told(costs))
        return [raw(f'<figure class="front-picture">{picture}<figcaption>'),
                *self.parsed("\n".join(self.content)), raw("</figcaption></figure>")]  # fmt: skip


class Cards(FactsDirective):
    has_content = True

    def run(self):
        folder = Path(self.env.srcdir, BOOK)
        chapters = [facts.page for facts in self.facts() if facts.chapter]
        pages = [page for line in self.content for page in (chapters if line == "chapters" else [line])]
        for page in set(pages) - set(drawings.CARDS):
            self.warn(f"drawings.py has no drawing for the card of {page}")
        cards = [self._card(page, folder) for page in pages if page in drawings.CARDS]
        return [nodes.bullet_list("", *cards, classes=["front-cards"])]

    def _card(self, page, folder):
        draw = drawings.CARDS[page]
        item = nodes.list_item("", raw(sketch.svg(draw(), *drawings.CARD, draw.__doc__)), classes=["front-card"])
        if Path(self.env.srcdir, FACTS, f"{page}.toml").is_file():
            self.env.note_dependency(str(folder / f"{page}.ipynb"))
            facts, answer = describe.chapter(page, folder)
            title, texts = f"{facts['number']} {facts['title']}", [f"*{facts['question']}*", answer.replace("**", "")]
        else:
            self.env.note_dependency(str(folder / f"{page}.md"))
            title, texts = describe.title(page, folder), [describe.description(page, folder)]
            if page == "appendix_claims":
                texts.append(
                    "Of {} claims in circulation, {} are right, {} half right and {} wrong.".format(
                        sum(counts := drawings.verdict_counts()), *counts
                    )
                )
        item += self.parsed("\n\n".join([f"{{doc}}`{title} </{BOOK}/{page}>`", *texts]))
        return item
