// The scenarios by name, in the order in which they run. Each takes {address, client, table} and returns a sentence
// for the report.

import grpc from '@grpc/grpc-js';
import { tableFromIPC } from 'apache-arrow';
import { dial, encodeJson, ipcStream, newBatch, WriteStream } from './flight.js';

const ONE_ROW_WRITES = 100;
const LARGE_WRITES = 4;
// 8 MiB: 8 bytes of id, 4 of offset and 20 of label in each row.
const LARGE_ROWS = 262_144;
// Enough for the cancellation to fall into the middle of them.
const CANCELLED_WRITES = 8;
const CLOSE_WRITES = 20;

function check(holds, complaint) {
  if (!holds) throw new Error(complaint);
}

// Everything that a server stream sends; throws the stream's status.
function collect(call) {
  return new Promise((resolve, reject) => {
    const messages = [];
    call.on('data', (message) => messages.push(message));
    call.on('error', reject);
    call.on('end', () => resolve(messages));
  });
}

async function create(client, name) {
  const fields = [
    { name: 'id', data_type: 'int64', nullable: false },
    { name: 'label', data_type: 'utf8' },
  ];
  const body = encodeJson({ name, schema_json: JSON.stringify({ fields }), table_type: 'append_only' });
  const results = await collect(client.DoAction({ type: 'CreateTable', body }));
  check(results.length === 1, `expected one result, got ${results.length}`);
  return JSON.parse(results[0].body.toString('utf8'));
}

// A table that only one scenario writes to.
async function fresh({ client, table }, name) {
  await create(client, table(name));
  return table(name);
}

const openExchange = (client, table, durability, options) =>
  new WriteStream(client, 'DoExchange', table, { requested_durability: durability }, options);

// Shows that the server still takes a write and acknowledges it, on the same channel.
async function oneWrite(client, table) {
  const stream = openExchange(client, table, 'disk');
  await stream.write(newBatch(0, 1));
  stream.call.end();
  await stream.waitEnd();
}

// A new table is created once; the same request again finds it.
async function createTable({ client, table }) {
  const name = table('create_table');
  const first = await create(client, name);
  check(first.name === `default.${name}` && first.table_uuid && first.created === true, JSON.stringify(first));
  const again = await create(client, name);
  check(again.created === false && again.table_uuid === first.table_uuid, `the same again: ${JSON.stringify(again)}`);
  return first.name;
}

// Batches of one row are acknowledged while the stream is open for writing.
async function oneRow(context) {
  const expected = 2 * ONE_ROW_WRITES + 1;
  const stream = openExchange(context.client, await fresh(context, 'one_row'), 'disk');
  await stream.write(newBatch(0, 1), 'object_storage');
  for (let id = 1; id < ONE_ROW_WRITES; id++) await stream.write(newBatch(id, 1));
  await stream.waitAcks(expected);
  stream.call.end();
  await stream.waitEnd();
  return `${ONE_ROW_WRITES} writes, ${expected} acks before the half-close`;
}

// Batches of 8 MiB in frames of 16 KiB go through all tiers.
async function large(context) {
  const stream = openExchange(context.client, await fresh(context, 'large'), 'iceberg_committed');
  for (let n = 0; n < LARGE_WRITES; n++) await stream.write(newBatch(n * LARGE_ROWS, LARGE_ROWS));
  stream.call.end();
  await stream.waitEnd();
  return `${LARGE_WRITES} writes of 8 MiB, ${stream.ledger.received} acks`;
}

// A DoGet of what this scenario wrote arrives whole through grpc-js's own windows and 4 MiB limit.
async function readBack(context) {
  const table = await fresh(context, 'read_back');
  const stream = openExchange(context.client, table, 'iceberg_committed');
  await stream.write(newBatch(0, LARGE_ROWS));
  await stream.write(newBatch(LARGE_ROWS, 1));
  stream.call.end();
  await stream.waitEnd();
  const read = tableFromIPC(ipcStream(await collect(context.client.DoGet({ ticket: Buffer.from(table) }))));
  let sum = 0n;
  for (const id of read.getChild('id')) sum += id;
  const count = BigInt(LARGE_ROWS + 1);
  check(
    BigInt(read.numRows) === count && sum === (count * (count - 1n)) / 2n,
    `read ${read.numRows} rows with ids summing up to ${sum}`,
  );
  return `${read.numRows} rows`;
}

// The same writes by DoPut, the acks as PutResults.
async function doPut(context) {
  const stream = new WriteStream(context.client, 'DoPut', await fresh(context, 'do_put'), null);
  for (let id = 0; id < ONE_ROW_WRITES; id++) await stream.write(newBatch(id, 1));
  stream.call.end();
  await stream.waitEnd();
  return `${stream.ledger.received} acks as PutResults`;
}

// Opens a stream that the server must refuse and checks its status.
async function checkRefused(client, table, code, errorCode) {
  const stream = openExchange(client, table, 'disk');
  await stream.write(newBatch(0, 1));
  const failure = await stream.waitFailure();
  check(failure !== null, `a stream for ${table} ended with OK`);
  const { details } = failure;
  check(
    failure.code === code && details.startsWith(`[${errorCode}]`) && details.includes(table),
    `expected ${grpc.status[code]} with [${errorCode}] and ${table}, got ${failure.message}`,
  );
  return details;
}

// A stream for a table that is not there ends with NOT_FOUND and a message that names the table.
const notFound = ({ client, table }) => checkRefused(client, table('absent'), grpc.status.NOT_FOUND, 'table_not_found');

// What a status message holds beyond ASCII arrives as it was written.
const statusText = ({ client }) =>
  checkRefused(client, 'größe%20', grpc.status.INVALID_ARGUMENT, 'invalid_request');

async function checkStatus(stream, code) {
  const failure = await stream.waitFailure();
  check(failure?.code === code, `expected ${grpc.status[code]}, got ${failure}`);
}

// A client that cancels while large batches are on their way leaves the channel usable.
async function cancel(context) {
  const table = await fresh(context, 'cancel');
  const stream = openExchange(context.client, table, 'disk');
  await stream.write(newBatch(0, 1));
  await stream.waitAcks(1);
  const batch = newBatch(0, LARGE_ROWS);
  const writing = (async () => {
    for (let n = 0; n < CANCELLED_WRITES; n++) await stream.write(batch);
  })();
  // The acks of the first large batch prove that the server is in the middle of a stream of them.
  await stream.waitAcks(4);
  stream.call.cancel();
  await checkStatus(stream, grpc.status.CANCELLED);
  await writing;
  await oneWrite(context.client, table);
  return 'the next stream works';
}

// An open, silent stream ends with DEADLINE_EXCEEDED, and the channel stays usable.
async function deadline(context) {
  const table = await fresh(context, 'deadline');
  const stream = openExchange(context.client, table, 'memory', { deadline: Date.now() + 1000 });
  await stream.write(newBatch(0, 1));
  await checkStatus(stream, grpc.status.DEADLINE_EXCEEDED);
  await oneWrite(context.client, table);
  return 'the next stream works';
}

// A client that is closed, which sends GOAWAY, goes on writing on its open call and gets every ack (T1).
async function closeWithAcks(context) {
  const table = await fresh(context, 'close');
  const own = dial(context.address);
  const stream = openExchange(own, table, 'iceberg_committed');
  for (let id = 0; id < CLOSE_WRITES; id++) await stream.write(newBatch(id, 1));
  // grpc-js drops a call that is not on its connection yet when its client is closed.
  await stream.waitAcks(1);
  own.close();
  const { outstanding } = stream.ledger;
  check(outstanding > 0, 'no ack was outstanding at close(): nothing was shown');
  for (let id = 0; id < CLOSE_WRITES; id++) await stream.write(newBatch(CLOSE_WRITES + id, 1));
  stream.call.end();
  await stream.waitEnd();
  return `${outstanding} acks outstanding at close(), all came, and those of ${CLOSE_WRITES} more writes`;
}

export const scenarios = {
  create_table: createTable,
  one_row: oneRow,
  large,
  read_back: readBack,
  do_put: doPut,
  not_found: notFound,
  status_text: statusText,
  cancel,
  deadline,
  close_with_acks: closeWithAcks,
};
