//! The stock reader of arrow-rs (`FlightClient` over tonic) reads acks while it writes, with no option at all.
//!
//! One JSON line for each scenario: `{"scenario", "ok", "detail"}`; the exit code is 0 if all hold.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use arrow_array::{Array, Int64Array, RecordBatch, StringArray};
use arrow_flight::decode::{DecodedPayload, FlightRecordBatchStream};
use arrow_flight::encode::FlightDataEncoderBuilder;
use arrow_flight::error::FlightError;
use arrow_flight::{Action, FlightClient, FlightData, FlightDescriptor, Ticket};
use arrow_schema::{DataType, Field, Schema};
use futures::{Stream, StreamExt, TryStreamExt};
use serde_json::{json, Value};
use tokio::sync::mpsc;
use tonic::transport::{Channel, Endpoint};

type Outcome<T> = Result<T, Box<dyn Error>>;

const TIERS: [&str; 4] = ["memory", "disk", "object_storage", "iceberg_committed"];
/// Ends only what hangs.
const PATIENCE: Duration = Duration::from_secs(100);

fn schema() -> Arc<Schema> {
    Arc::new(Schema::new(vec![
        Field::new("n", DataType::Int64, false),
        Field::new("name", DataType::Utf8, true),
    ]))
}

fn batch(first: i64, rows: i64) -> RecordBatch {
    let numbers: Vec<i64> = (first..first + rows).collect();
    let names: Vec<String> = numbers.iter().map(|n| format!("name {n}")).collect();
    RecordBatch::try_new(
        schema(),
        vec![Arc::new(Int64Array::from(numbers)), Arc::new(StringArray::from(names))],
    )
    .unwrap()
}

async fn act(client: &mut FlightClient, kind: &str, body: Value) -> Outcome<Value> {
    let results: Vec<_> = client
        .do_action(Action::new(kind, body.to_string()))
        .await?
        .try_collect()
        .await?;
    Ok(serde_json::from_slice(&results[0])?)
}

async fn fresh(client: &mut FlightClient, name: &str) -> Outcome<String> {
    let fields = json!([
        {"name": "n", "type": "Int64", "nullable": false},
        {"name": "name", "type": "Utf8"},
    ]);
    let name = format!("rust_{name}");
    act(client, "CreateTable", json!({"name": name, "schema_json": {"fields": fields}})).await?;
    Ok(name)
}

/// Read one ack: a batch of no rows behind an empty schema.
async fn ack(reader: &mut arrow_flight::decode::FlightDataDecoder) -> Outcome<Option<Value>> {
    while let Some(message) = reader.next().await {
        let message = message?;
        match message.payload {
            DecodedPayload::Schema(schema) if schema.fields().is_empty() => {}
            DecodedPayload::RecordBatch(batch) if batch.num_rows() == 0 => {
                return Ok(Some(serde_json::from_slice(&message.inner.app_metadata)?));
            }
            other => return Err(format!("neither the empty schema nor an ack: {other:?}").into()),
        }
    }
    Ok(None)
}

fn expect_tiers(acks: &[Value], writes: u64, tiers: &[&str]) -> Outcome<()> {
    for sequence in 0..writes {
        let found: Vec<&str> = acks
            .iter()
            .filter(|ack| ack["sequence"] == sequence && ack["error"].is_null())
            .filter_map(|ack| ack["durability_level"].as_str())
            .collect();
        if found != tiers {
            return Err(format!("write {sequence} got the acks {found:?}, expected {tiers:?}").into());
        }
    }
    if acks.len() as u64 != writes * tiers.len() as u64 {
        return Err(format!("{} acks of {writes} writes", acks.len()).into());
    }
    Ok(())
}

/// Write a batch, read its acks, then write the next: the reader was made before the first write.
async fn ping_pong(client: &mut FlightClient) -> Outcome<()> {
    let table = fresh(client, "ping_pong").await?;
    let (sender, mut receiver) = mpsc::channel::<RecordBatch>(1);
    let batches = futures::stream::poll_fn(move |context| receiver.poll_recv(context)).map(Ok::<_, FlightError>);
    let request = FlightDataEncoderBuilder::new()
        .with_schema(schema())
        .with_flight_descriptor(Some(FlightDescriptor::new_path(vec![table])))
        .build(batches);
    let mut reader = client.do_exchange(request).await?.into_inner();
    let mut acks = Vec::new();
    for number in 0..5 {
        sender.send(batch(number * 10, 10)).await?;
        for _ in 0..2 {
            acks.push(ack(&mut reader).await?.ok_or("the stream ended early")?);
        }
    }
    drop(sender);
    if let Some(more) = ack(&mut reader).await? {
        return Err(format!("one ack too many: {more}").into());
    }
    expect_tiers(&acks, 5, &TIERS[..2])
}

/// All tiers of many batches, with a WriteRequest on the schema message.
async fn all_tiers(client: &mut FlightClient) -> Outcome<()> {
    let table = fresh(client, "all_tiers").await?;
    let metadata = json!({"requested_durability": "iceberg_committed", "idempotency_key": "rust"}).to_string();
    let request = FlightDataEncoderBuilder::new()
        .with_metadata(metadata.into())
        .with_flight_descriptor(Some(FlightDescriptor::new_path(vec![table])))
        .build(futures::stream::iter((0..20).map(|n| Ok::<_, FlightError>(batch(n * 100, 100)))));
    let mut reader = client.do_exchange(request).await?.into_inner();
    let mut acks = Vec::new();
    while let Some(found) = ack(&mut reader).await? {
        acks.push(found);
    }
    expect_tiers(&acks, 20, &TIERS)
}

/// The reader that yields batches alone takes the acks without an error.
async fn batches_alone(client: &mut FlightClient) -> Outcome<()> {
    let table = fresh(client, "batches_alone").await?;
    let request = FlightDataEncoderBuilder::new()
        .with_flight_descriptor(Some(FlightDescriptor::new_path(vec![table])))
        .build(futures::stream::iter(vec![Ok::<_, FlightError>(batch(0, 3))]));
    let reader: FlightRecordBatchStream = client.do_exchange(request).await?;
    let found: Vec<RecordBatch> = reader.try_collect().await?;
    match found.iter().map(RecordBatch::num_rows).collect::<Vec<_>>().as_slice() {
        [0, 0] => Ok(()),
        other => Err(format!("batches of {other:?} rows").into()),
    }
}

/// DoPut, and the rows back from the snapshot and the log; the client takes no message above 4 MiB.
async fn read_back(client: &mut FlightClient) -> Outcome<()> {
    let table = fresh(client, "read_back").await?;
    for durability in ["iceberg_committed", "disk"] {
        let first = if durability == "disk" { 300_000 } else { 0 };
        let metadata = json!({"requested_durability": durability}).to_string();
        let request = FlightDataEncoderBuilder::new()
            .with_metadata(metadata.into())
            .with_max_flight_data_size(16 << 20)
            .with_flight_descriptor(Some(FlightDescriptor::new_path(vec![table.clone()])))
            .build(futures::stream::iter(vec![Ok::<_, FlightError>(batch(first, 300_000))]));
        let acks: Vec<_> = client.do_put(request).await?.try_collect().await?;
        if acks.is_empty() {
            return Err("DoPut gave no acks".into());
        }
    }
    let answer = client.do_get(Ticket::new(table)).await?;
    let mut numbers: Vec<i64> = Vec::new();
    let batches: Vec<RecordBatch> = answer.try_collect().await?;
    for batch in &batches {
        let column = batch.column(0).as_any().downcast_ref::<Int64Array>().ok_or("not int64")?;
        numbers.extend(column.values());
    }
    numbers.sort_unstable();
    if numbers == (0..600_000).collect::<Vec<i64>>() {
        Ok(())
    } else {
        Err(format!("{} rows came back", numbers.len()).into())
    }
}

/// A stream that asks for acks in metadata gets them so, behind the empty schema.
async fn metadata_if_asked(client: &mut FlightClient) -> Outcome<()> {
    let table = fresh(client, "metadata_if_asked").await?;
    let metadata = json!({"ack_as": "metadata"}).to_string();
    let request = FlightDataEncoderBuilder::new()
        .with_metadata(metadata.into())
        .with_flight_descriptor(Some(FlightDescriptor::new_path(vec![table])))
        .build(futures::stream::iter(vec![Ok::<_, FlightError>(batch(0, 3))]));
    let messages = raw(client, request).await?;
    let sizes: Vec<(bool, bool)> =
        messages.iter().map(|data| (data.data_header.is_empty(), data.app_metadata.is_empty())).collect();
    if sizes == [(false, true), (true, false), (true, false)] {
        Ok(())
    } else {
        Err(format!("(header empty, metadata empty): {sizes:?}").into())
    }
}

async fn raw(
    client: &mut FlightClient,
    request: impl Stream<Item = Result<FlightData, FlightError>> + Send + 'static,
) -> Outcome<Vec<FlightData>> {
    let request = request.map(|data| data.unwrap());
    Ok(client.inner_mut().do_exchange(request).await?.into_inner().try_collect().await?)
}

async fn connect(address: &str) -> Outcome<FlightClient> {
    let channel: Channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
    Ok(FlightClient::new(channel))
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Outcome<()> {
    let address = std::env::args().nth(1).ok_or("usage: arka-rust HOST:PORT")?;
    let mut failed = false;
    for name in ["ping_pong", "all_tiers", "batches_alone", "read_back", "metadata_if_asked"] {
        let mut client = connect(&address).await?;
        let run = async {
            match name {
                "ping_pong" => ping_pong(&mut client).await,
                "all_tiers" => all_tiers(&mut client).await,
                "batches_alone" => batches_alone(&mut client).await,
                "read_back" => read_back(&mut client).await,
                _ => metadata_if_asked(&mut client).await,
            }
        };
        let outcome = match tokio::time::timeout(PATIENCE, run).await {
            Ok(outcome) => outcome.map_err(|error| error.to_string()),
            Err(_) => Err("it hangs".to_string()),
        };
        failed |= outcome.is_err();
        let detail = outcome.as_ref().err().cloned().unwrap_or_default();
        println!("{}", json!({"scenario": name, "ok": outcome.is_ok(), "detail": detail}));
    }
    std::process::exit(i32::from(failed))
}
