// Guides come before pages that are looked things up in: these name every word of the program.
const LOOKED_UP = ["api", "architecture", "changelog", "checked", "command_lines", "configuration", "extending"];
var Scorer = {
  score: ([page, , , , score]) => (LOOKED_UP.includes(page) || page.startsWith("experiments/") ? score / 4 : score),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
