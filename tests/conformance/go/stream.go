package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
)

// largeRows makes a batch of 8 MiB: 8 bytes of id, 4 of offset and 20 of label in each row.
const largeRows = 262_144

var schema = arrow.NewSchema([]arrow.Field{
	{Name: "id", Type: arrow.PrimitiveTypes.Int64},
	{Name: "label", Type: arrow.BinaryTypes.String, Nullable: true},
}, nil)

// newBatch holds rows with ids from first.
func newBatch(first, rows int64) arrow.RecordBatch {
	builder := array.NewRecordBuilder(memory.DefaultAllocator, schema)
	defer builder.Release()
	ids := builder.Field(0).(*array.Int64Builder)
	labels := builder.Field(1).(*array.StringBuilder)
	for id := first; id < first+rows; id++ {
		ids.Append(id)
		labels.Append(fmt.Sprintf("label-%014d", id))
	}
	return builder.NewRecordBatch()
}

func describe(table string) *flight.FlightDescriptor {
	return &flight.FlightDescriptor{Type: flight.DescriptorPATH, Path: []string{table}}
}

// writeRequest is the part of a WriteRequest that the scenarios use.
type writeRequest struct {
	TableName           string `json:"table_name,omitempty"`
	RequestedDurability string `json:"requested_durability,omitempty"`
}

func (r writeRequest) encode() []byte {
	encoded, err := json.Marshal(r)
	if err != nil {
		panic(err) // two strings always encode
	}
	return encoded
}

// exchange is one DoExchange: written by the caller, its acks read by a goroutine with the generated stub's Recv.
type exchange struct {
	stream flight.FlightService_DoExchangeClient
	writer *flight.Writer
	acks   *ackReader
}

// openExchange sends the stream's defaults in a metadata-only message, ahead of the schema.
func (c *client) openExchange(ctx context.Context, table, durability string) (*exchange, error) {
	stream, err := c.flight.DoExchange(ctx)
	if err != nil {
		return nil, err
	}
	request := writeRequest{TableName: table, RequestedDurability: durability}
	err = stream.Send(&flight.FlightData{FlightDescriptor: describe(table), AppMetadata: request.encode()})
	if err != nil && !errors.Is(err, io.EOF) { // io.EOF: the status is Recv's to tell
		return nil, err
	}
	receive := func() ([]byte, error) {
		for {
			message, err := stream.Recv()
			if err != nil {
				return nil, err
			}
			if len(message.DataBody) != 0 {
				return nil, fmt.Errorf("an ack came with data")
			}
			// The empty schema comes first: it is for the record reader, and has no metadata.
			if len(message.AppMetadata) != 0 {
				return message.AppMetadata, nil
			}
		}
	}
	return &exchange{
		stream: stream,
		writer: flight.NewRecordWriter(stream, ipc.WithSchema(schema)),
		acks:   readAcks(receive),
	}, nil
}

// writeAll sends batches of the stream's default durability.
func (e *exchange) writeAll(durability string, batches ...arrow.RecordBatch) error {
	for _, batch := range batches {
		e.acks.expect(durability, batch.NumRows())
		if err := e.writer.Write(batch); err != nil {
			return err
		}
	}
	return nil
}

// oneWrite shows that the server still takes a write and acknowledges it, on the same channel.
func (c *client) oneWrite(ctx context.Context, table string) error {
	e, err := c.openExchange(ctx, table, "disk")
	if err != nil {
		return err
	}
	if err := e.writeAll("disk", newBatch(0, 1)); err != nil {
		return err
	}
	if err := e.stream.CloseSend(); err != nil {
		return err
	}
	return e.acks.waitEnd(ctx)
}
