package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	oneRowWrites = 100
	largeWrites  = 4
	closeWrites  = 20
)

// create makes a table of the common schema and returns what the server said.
func (c *client) create(ctx context.Context, name string) (fullName, uuid string, created bool, err error) {
	fields := `{"fields": [{"name": "id", "data_type": "int64", "nullable": false}, {"name": "label", "data_type": "utf8"}]}`
	body, err := json.Marshal(map[string]any{"name": name, "schema_json": fields, "table_type": "append_only"})
	if err != nil {
		return "", "", false, err
	}
	stream, err := c.flight.DoAction(ctx, &flight.Action{Type: "CreateTable", Body: body})
	if err != nil {
		return "", "", false, err
	}
	result, err := stream.Recv()
	if err != nil {
		return "", "", false, err
	}
	var answer struct {
		Name      string `json:"name"`
		TableUUID string `json:"table_uuid"`
		Created   bool   `json:"created"`
	}
	if err := json.Unmarshal(result.Body, &answer); err != nil {
		return "", "", false, err
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return "", "", false, fmt.Errorf("expected one result, then the end; got %v", err)
	}
	return answer.Name, answer.TableUUID, answer.Created, nil
}

// fresh makes a table that only one scenario writes to.
func (c *client) fresh(ctx context.Context, name string) (string, error) {
	table := c.table(name)
	_, _, _, err := c.create(ctx, table)
	return table, err
}

// createTable: a new table is created once; the same request again finds it.
func createTable(ctx context.Context, c *client) (string, error) {
	table := c.table("create_table")
	name, uuid, created, err := c.create(ctx, table)
	if err != nil {
		return "", err
	}
	if name != "default."+table || uuid == "" || !created {
		return "", fmt.Errorf("unexpected answer: name %q, table_uuid %q, created %v", name, uuid, created)
	}
	_, again, created, err := c.create(ctx, table)
	if err != nil {
		return "", err
	}
	if created || again != uuid {
		return "", fmt.Errorf("the same table again: table_uuid %q, expected %q; created %v", again, uuid, created)
	}
	return name, nil
}

// oneRow: batches of one row are acknowledged while the stream is open for writing. The first has a WriteRequest of
// its own, which arrow-go's writer sends with the schema too: it must not become the stream's default (T18).
func oneRow(ctx context.Context, c *client) (string, error) {
	table, err := c.fresh(ctx, "one_row")
	if err != nil {
		return "", err
	}
	e, err := c.openExchange(ctx, table, "disk")
	if err != nil {
		return "", err
	}
	e.acks.expect("object_storage", 1)
	first := writeRequest{RequestedDurability: "object_storage"}
	if err := e.writer.WriteWithAppMetadata(newBatch(0, 1), first.encode()); err != nil {
		return "", err
	}
	for id := int64(1); id < oneRowWrites; id++ {
		if err := e.writeAll("disk", newBatch(id, 1)); err != nil {
			return "", err
		}
	}
	expected := 2*oneRowWrites + 1
	if err := e.acks.waitAcks(ctx, expected); err != nil {
		return "", fmt.Errorf("before the half-close: %w", err)
	}
	if err := e.stream.CloseSend(); err != nil {
		return "", err
	}
	if err := e.acks.waitEnd(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d writes, %d acks before the half-close", oneRowWrites, expected), nil
}

// large: batches of 8 MiB in frames of 16 KiB go through all tiers.
func large(ctx context.Context, c *client) (string, error) {
	table, err := c.fresh(ctx, "large")
	if err != nil {
		return "", err
	}
	e, err := c.openExchange(ctx, table, "iceberg_committed")
	if err != nil {
		return "", err
	}
	for n := int64(0); n < largeWrites; n++ {
		if err := e.writeAll("iceberg_committed", newBatch(n*largeRows, largeRows)); err != nil {
			return "", err
		}
	}
	if err := e.stream.CloseSend(); err != nil {
		return "", err
	}
	if err := e.acks.waitEnd(ctx); err != nil {
		return "", err
	}
	received, _ := e.acks.counts()
	return fmt.Sprintf("%d writes of 8 MiB, %d acks", largeWrites, received), nil
}

// readBack: a DoGet of what this scenario wrote arrives whole through grpc-go's own windows and 4 MiB limit.
func readBack(ctx context.Context, c *client) (string, error) {
	table, err := c.fresh(ctx, "read_back")
	if err != nil {
		return "", err
	}
	e, err := c.openExchange(ctx, table, "iceberg_committed")
	if err != nil {
		return "", err
	}
	if err := e.writeAll("iceberg_committed", newBatch(0, largeRows), newBatch(largeRows, 1)); err != nil {
		return "", err
	}
	if err := e.stream.CloseSend(); err != nil {
		return "", err
	}
	if err := e.acks.waitEnd(ctx); err != nil {
		return "", err
	}
	stream, err := c.flight.DoGet(ctx, &flight.Ticket{Ticket: []byte(table)})
	if err != nil {
		return "", err
	}
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		return "", err
	}
	defer reader.Release()
	rows, sum := int64(0), int64(0)
	for reader.Next() {
		batch := reader.RecordBatch()
		rows += batch.NumRows()
		for _, id := range batch.Column(0).(*array.Int64).Int64Values() {
			sum += id
		}
	}
	if err := reader.Err(); err != nil {
		return "", err
	}
	count := int64(largeRows + 1)
	if expected := count * (count - 1) / 2; rows != count || sum != expected {
		return "", fmt.Errorf("read %d rows with ids summing up to %d, expected %d and %d", rows, sum, count, expected)
	}
	return fmt.Sprintf("%d rows", rows), nil
}

// recordReader: arrow-go's own record reader, made before the first write and without any option, reads acks (T20). It
// rejects metadata-only messages: the server knows it by its user-agent.
func recordReader(ctx context.Context, c *client) (string, error) {
	table, err := c.fresh(ctx, "record_reader")
	if err != nil {
		return "", err
	}
	stream, err := c.flight.DoExchange(ctx)
	if err != nil {
		return "", err
	}
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		return "", err
	}
	writer := flight.NewRecordWriter(stream, ipc.WithSchema(schema))
	writer.SetFlightDescriptor(describe(table))
	if err := writer.Write(newBatch(0, 1)); err != nil {
		return "", err
	}
	defer reader.Release()
	acks := readAcks(func() ([]byte, error) {
		if reader.Next() {
			return reader.LatestAppMetadata(), nil
		}
		if err := reader.Err(); err != nil {
			return nil, err
		}
		return nil, io.EOF
	})
	acks.expect("disk", 1)
	for id := int64(1); id < oneRowWrites; id++ {
		acks.expect("disk", 1)
		if err := writer.Write(newBatch(id, 1)); err != nil {
			return "", err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return "", err
	}
	if err := acks.waitEnd(ctx); err != nil {
		return "", err
	}
	received, _ := acks.counts()
	return fmt.Sprintf("%d acks through flight.NewRecordReader", received), nil
}

// doPut: the same writes by DoPut, the acks as PutResults.
func doPut(ctx context.Context, c *client) (string, error) {
	table, err := c.fresh(ctx, "do_put")
	if err != nil {
		return "", err
	}
	stream, err := c.flight.DoPut(ctx)
	if err != nil {
		return "", err
	}
	acks := readAcks(func() ([]byte, error) {
		result, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		return result.AppMetadata, nil
	})
	writer := flight.NewRecordWriter(stream, ipc.WithSchema(schema))
	writer.SetFlightDescriptor(describe(table))
	for id := int64(0); id < oneRowWrites; id++ {
		acks.expect("disk", 1)
		if err := writer.Write(newBatch(id, 1)); err != nil {
			return "", err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return "", err
	}
	if err := acks.waitEnd(ctx); err != nil {
		return "", err
	}
	received, _ := acks.counts()
	return fmt.Sprintf("%d acks as PutResults", received), nil
}

// refused opens a stream that the server must refuse and returns the status.
func (c *client) refused(ctx context.Context, table string) (*status.Status, error) {
	e, err := c.openExchange(ctx, table, "disk")
	if err != nil {
		return nil, err
	}
	// The write may fail or not, as the status overtakes it or not: the status is what Recv says.
	_ = e.writeAll("disk", newBatch(0, 1))
	ended := e.acks.waitStatus(ctx)
	if ended == nil {
		return nil, fmt.Errorf("a stream for %q ended with OK", table)
	}
	return status.Convert(ended), nil
}

// notFound: a stream for a table that is not there ends with NOT_FOUND and a message that names the table.
func notFound(ctx context.Context, c *client) (string, error) {
	table := c.table("absent")
	s, err := c.refused(ctx, table)
	if err != nil {
		return "", err
	}
	if s.Code() != codes.NotFound || !strings.HasPrefix(s.Message(), "[table_not_found]") || !strings.Contains(s.Message(), table) {
		return "", fmt.Errorf("expected NotFound with [table_not_found] and %s, got %s: %s", table, s.Code(), s.Message())
	}
	return s.Message(), nil
}

// statusText: what a status message holds beyond ASCII arrives as it was written.
func statusText(ctx context.Context, c *client) (string, error) {
	s, err := c.refused(ctx, "größe%20")
	if err != nil {
		return "", err
	}
	if s.Code() != codes.InvalidArgument || !strings.HasPrefix(s.Message(), "[invalid_request]") || !strings.Contains(s.Message(), "größe%20") {
		return "", fmt.Errorf("expected InvalidArgument with [invalid_request] and größe%%20, got %s: %s", s.Code(), s.Message())
	}
	return s.Message(), nil
}

// cancelMidStream: a client that cancels while a large batch is on its way leaves the channel usable.
func cancelMidStream(ctx context.Context, c *client) (string, error) {
	table, err := c.fresh(ctx, "cancel")
	if err != nil {
		return "", err
	}
	cancellable, cancel := context.WithCancel(ctx)
	defer cancel()
	e, err := c.openExchange(cancellable, table, "disk")
	if err != nil {
		return "", err
	}
	if err := e.writeAll("disk", newBatch(0, 1)); err != nil {
		return "", err
	}
	if err := e.acks.waitAcks(ctx, 1); err != nil {
		return "", err
	}
	batch := newBatch(0, largeRows)
	writing := make(chan struct{})
	go func() {
		defer close(writing)
		for e.writeAll("disk", batch) == nil {
		}
	}()
	// The acks of the first large batch prove that the server is in the middle of a stream of them.
	if err := e.acks.waitAcks(ctx, 4); err != nil {
		return "", err
	}
	cancel()
	if code := status.Code(e.acks.waitStatus(ctx)); code != codes.Canceled {
		return "", fmt.Errorf("expected Canceled, got %s", code)
	}
	<-writing
	if err := c.oneWrite(ctx, table); err != nil {
		return "", fmt.Errorf("after the cancellation: %w", err)
	}
	return "the next stream works", nil
}

// deadline: an open, silent stream ends with DEADLINE_EXCEEDED, and the channel stays usable.
func deadline(ctx context.Context, c *client) (string, error) {
	table, err := c.fresh(ctx, "deadline")
	if err != nil {
		return "", err
	}
	short, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	e, err := c.openExchange(short, table, "memory")
	if err != nil {
		return "", err
	}
	if err := e.writeAll("memory", newBatch(0, 1)); err != nil {
		return "", err
	}
	if code := status.Code(e.acks.waitStatus(ctx)); code != codes.DeadlineExceeded {
		return "", fmt.Errorf("expected DeadlineExceeded, got %s", code)
	}
	if err := c.oneWrite(ctx, table); err != nil {
		return "", fmt.Errorf("after the deadline: %w", err)
	}
	return "the next stream works", nil
}

// closeWithAcks: after the half-close every ack still comes. grpc-go's Close cancels open calls, so its orderly way is to
// half-close, drain, and close the channel then; the channel is this scenario's own.
func closeWithAcks(ctx context.Context, c *client) (string, error) {
	table, err := c.fresh(ctx, "close")
	if err != nil {
		return "", err
	}
	channel, err := dial(c.address)
	if err != nil {
		return "", err
	}
	defer channel.Close()
	own := &client{c.address, c.suffix, flight.NewFlightServiceClient(channel)}
	e, err := own.openExchange(ctx, table, "iceberg_committed")
	if err != nil {
		return "", err
	}
	batches := make([]arrow.RecordBatch, closeWrites)
	for n := range batches {
		batches[n] = newBatch(int64(n), 1)
	}
	if err := e.writeAll("iceberg_committed", batches...); err != nil {
		return "", err
	}
	if err := e.stream.CloseSend(); err != nil {
		return "", err
	}
	received, outstanding := e.acks.counts()
	if outstanding == 0 {
		return "", fmt.Errorf("no ack was outstanding at the half-close: nothing was shown")
	}
	if err := e.acks.waitEnd(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d acks outstanding after %d, all came", outstanding, received), channel.Close()
}
