// Drives an Arka server with @grpc/grpc-js and Arrow IPC from apache-arrow.
//
// Takes the server's host:port, then optionally the scenarios to run, and prints one line of JSON for each:
// {"scenario", "ok", "detail"}. Exits with 1 when one of them failed. What it expects is the wire contract
// (protocol 3 to 6); it knows nothing of the server's inside.

import { dial } from './flight.js';
import { scenarios } from './scenarios.js';
import { randomBytes } from 'node:crypto';

// Turns a hang into a failure that names its scenario.
const SCENARIO_DEADLINE_MS = 60_000;

async function runOne(name, scenario, context) {
  const started = performance.now();
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`not done after ${SCENARIO_DEADLINE_MS} ms`)), SCENARIO_DEADLINE_MS);
  });
  try {
    const detail = await Promise.race([scenario(context), late]);
    return { scenario: name, ok: true, detail: `${detail} (${Math.round(performance.now() - started)} ms)` };
  } catch (error) {
    return { scenario: name, ok: false, detail: String(error.message ?? error) };
  } finally {
    clearTimeout(timer);
  }
}

async function run([address, ...wanted]) {
  const unknown = wanted.filter((name) => !(name in scenarios));
  if (!address || unknown.length > 0) {
    console.error(`usage: main.js HOST:PORT [SCENARIO...]; the scenarios are ${Object.keys(scenarios).join(', ')}`);
    return 2;
  }
  const suffix = randomBytes(4).toString('hex');
  const context = { address, client: dial(address), table: (name) => `js_${name}_${suffix}` };
  let failed = false;
  for (const [name, scenario] of Object.entries(scenarios)) {
    if (wanted.length > 0 && !wanted.includes(name)) continue;
    const line = await runOne(name, scenario, context);
    failed ||= !line.ok;
    console.log(JSON.stringify(line));
  }
  context.client.close();
  return failed ? 1 : 0;
}

process.exitCode = await run(process.argv.slice(2));
// A call that a failed scenario left open would keep the process alive.
if (process.exitCode !== 0) process.exit();
