// Sphinx's search puts a page in which all words stand before a place that is called so. What is called exactly as the
// reader asked, such as a term, an equation or a section, comes first.
Scorer.score = ([, title, , , score]) => {
  const asked = new URLSearchParams(location.search).get("q")?.trim().toLowerCase();
  const name = title.split(" > ").pop().replace(/^[\d.]+ | \([\d.]+\)$/g, "");
  return score + (name.toLowerCase() === asked ? 100 : 0);
};

// An excerpt comes from the article. Sphinx takes it from all of `main`, where the theme's contents stand first. Of a
// glossary's term it shows the name alone, so the explanation is put into it.
const textOf = Search.htmlToText;
Search.htmlToText = (page, anchor) => {
  const article = new DOMParser().parseFromString(page, "text/html").querySelector("article.bd-article");
  article?.setAttribute("role", "main");
  const meaning = anchor && article?.querySelector(`dt${anchor} ~ dd`);
  if (meaning) article.querySelector(anchor).append(". ", meaning.textContent);
  return textOf(article?.outerHTML ?? page, anchor);
};
