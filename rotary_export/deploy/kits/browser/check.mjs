// Opens the page in headless Chromium, once for each folder of inputs, and prints what it shows.
// node check.mjs [--prompt TEXT | --ids 1,2,3] [--max-new-tokens N] [--screenshot FILE] [FOLDER ...]

import { parseArgs } from "node:util";

import { startServer } from "./serve.mjs";

const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";

async function main() {
  const { values, positionals } = parseArgs({
    options: {
      screenshot: { type: "string" },
      prompt: { type: "string" },
      ids: { type: "string" },
      "max-new-tokens": { type: "string" },
    },
    allowPositionals: true,
  });
  const { chromium } = await import("playwright-core").catch(() => {
    throw new Error("playwright-core is not installed: npm ci --ignore-scripts");
  });
  const server = await startServer(import.meta.dirname, 0);
  let browser;
  try {
    browser = await chromium.launch({ executablePath, args: ["--disable-gpu"] });
    const page = await browser.newPage({ viewport: { width: 1120, height: 640 } });
    for (const inputs of positionals.length ? positionals : ["example"]) {
      const wanted = { inputs, prompt: values.prompt, ids: values.ids };
      wanted.max_new_tokens = values["max-new-tokens"];
      const query = new URLSearchParams(Object.entries(wanted).filter(([, value]) => value));
      await page.goto(`http://127.0.0.1:${server.address().port}/?${query}`);
      await page.waitForSelector("body:not([data-state=running])", { timeout: 200_000 });
      const state = await page.getAttribute("body", "data-state");
      const verdict = await page.textContent("#verdict");
      const report = await page.evaluate(() => globalThis.report);
      console.log(JSON.stringify({ inputs, state, verdict, chromium: browser.version(), ...report }));
      if (state !== "passed") process.exitCode = 1;
      if (values.screenshot) await page.screenshot({ path: values.screenshot, fullPage: true });
    }
  } finally {
    await browser?.close();
    server.close();
  }
}

try {
  await main();
} catch (error) {
  console.error(`error: ${error.message.split("\n")[0]}`);
  process.exitCode = 1;
}
