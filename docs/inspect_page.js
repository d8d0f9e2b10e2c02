() => {
  const found = {links: [], ids: [], problems: []};
  for (const a of document.querySelectorAll("a[href]")) found.links.push(a.href);
  for (const e of document.querySelectorAll("[id], a[name]")) found.ids.push(e.id || e.name);
  const where = e => {
    const text = (e.innerText || e.textContent || "").trim().replace(/\s+/g, " ").slice(0, 60);
    const kind = e.className && e.className.baseVal === undefined ? "." + e.className : "";
    return `<${e.localName}${kind}> "${text}"`;
  };
  const say = (what, e) => found.problems.push(`${what}: ${where(e)}`);

  const wide = document.documentElement.clientWidth;
  const page = document.querySelector("article") || document.body;
  const boxes = e => ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX);
  const boxed = e => e !== page && (boxes(e) || boxed(e.parentElement));
  for (const e of page.querySelectorAll("*"))
    if (e.getBoundingClientRect().right > wide + 1 && !boxed(e)) say("wider than the window", e);
  if (document.documentElement.scrollWidth > wide)
    found.problems.push(
      `the page is ${document.documentElement.scrollWidth} px wide in a window of ${wide}`);
  for (const pre of document.querySelectorAll("article div.highlight pre"))
    if (!pre.closest(".highlight").querySelector("button.copybtn")) say("no copy button", pre);
  const file = address => address.split("/").pop();  // Sphinx's own stand-in is the file's name
  for (const img of document.querySelectorAll("article img"))
    if (!img.alt.trim() || file(img.alt) === file(img.src))
      found.problems.push(`no alternative text: ${img.src}`);
  for (const svg of document.querySelectorAll("article svg.drawing"))
    if (!svg.getAttribute("aria-label") && !svg.querySelector("title")) say("no title", svg);

  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const seen = {};
  const rgba = colour => {
    if (!(colour in seen)) {
      canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
      seen[colour] = [r, g, b, a / 255];
    }
    return seen[colour];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const background = e => {
    const layers = [];
    for (; e; e = e.parentElement) {
      const layer = rgba(getComputedStyle(e).backgroundColor);
      if (layer[3] > 0) layers.push(layer);
      if (layer[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const luminance = c => {
    const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const judged = new Set();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = texts.nextNode());) {
    const e = node.parentElement;
    if (!node.data.trim() || judged.has(e)) continue;
    if (e.closest("script, style, noscript, title, desc, .headerlink, button")) continue;
    judged.add(e);
    if (!e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true})) continue;
    const style = getComputedStyle(e), svg = e.closest("svg");
    const scale = svg && e.getScreenCTM ? e.getScreenCTM().a : 1;
    const size = parseFloat(style.fontSize) * scale;
    if (svg) {
      const text = e.getBoundingClientRect(), sheet = svg.getBoundingClientRect();
      const beside = text.left > sheet.left - 1 && text.right < sheet.right + 1;
      const inside = beside && text.bottom < sheet.bottom + 1;
      if (!inside) say("cut off by its drawing", e);
    }
    if (size < 10 && !e.closest("math, sub, sup")) say(`text of ${size.toFixed(1)} px`, e);
    const below = background(svg || e), ink = rgba(svg ? style.fill : style.color);
    const [light, dark] = [luminance(over(ink, below)), luminance(below)].sort((a, b) => b - a);
    const ratio = (light + 0.05) / (dark + 0.05);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5))
      say(`contrast ${ratio.toFixed(2)}, ${style.color} on rgb(${below.map(Math.round)})`, e);
  }
  return found;
}
