package main

import (
	"encoding/json"
	"fmt"
	"slices"
)

// tiers in the order in which a write reaches them (protocol 3).
var tiers = []string{"memory", "disk", "object_storage", "iceberg_committed"}

// through lists the tiers that a write with this durability is acknowledged for.
func through(durability string) []string {
	return tiers[:slices.Index(tiers, durability)+1]
}

// ack is an AckMessage; error is a pointer because null and absent mean that there is none.
type ack struct {
	LSN             int64   `json:"lsn"`
	DurabilityLevel string  `json:"durability_level"`
	TimestampUs     int64   `json:"timestamp_us"`
	Error           *string `json:"error"`
	Sequence        int     `json:"sequence"`
	Rows            *int64  `json:"rows"`
	SnapshotID      *string `json:"snapshot_id"`
}

// ackLedger holds one stream's acks against the promises of protocol 3: each write gets one ack for each tier
// up to its durability, in the order of the tiers; for each tier, sequences and LSNs increase.
type ackLedger struct {
	writes []*ledgerWrite
	// lastSequence and lastLSN belong to the last ack of each tier.
	lastSequence map[string]int
	lastLSN      map[string]int64
	received     int
}

type ledgerWrite struct {
	expected []string
	rows     int64
	lsn      int64
	reached  int
}

func newAckLedger() *ackLedger {
	return &ackLedger{lastSequence: map[string]int{}, lastLSN: map[string]int64{}}
}

// expect announces the stream's next write.
func (l *ackLedger) expect(durability string, rows int64) {
	l.writes = append(l.writes, &ledgerWrite{expected: through(durability), rows: rows})
}

// outstanding counts the acks that are still to come.
func (l *ackLedger) outstanding() int {
	total := 0
	for _, w := range l.writes {
		total += len(w.expected) - w.reached
	}
	return total
}

// take checks one ack's JSON.
func (l *ackLedger) take(metadata []byte) error {
	var a ack
	if err := json.Unmarshal(metadata, &a); err != nil {
		return fmt.Errorf("ack is not JSON: %q: %w", metadata, err)
	}
	if a.Error != nil {
		return fmt.Errorf("error ack: %s", metadata)
	}
	if a.Sequence < 0 || a.Sequence >= len(l.writes) {
		return fmt.Errorf("ack for a write that was never made: %s", metadata)
	}
	write := l.writes[a.Sequence]
	if write.reached == len(write.expected) {
		return fmt.Errorf("one ack too many: %s", metadata)
	}
	if next := write.expected[write.reached]; a.DurabilityLevel != next {
		return fmt.Errorf("expected the ack for %s, got %s", next, metadata)
	}
	if last, seen := l.lastSequence[a.DurabilityLevel]; seen && a.Sequence <= last {
		return fmt.Errorf("sequence does not increase after %d: %s", last, metadata)
	}
	if last := l.lastLSN[a.DurabilityLevel]; a.LSN <= last {
		return fmt.Errorf("LSN does not increase after %d: %s", last, metadata)
	}
	if write.lsn != 0 && a.LSN != write.lsn {
		return fmt.Errorf("the write had LSN %d: %s", write.lsn, metadata)
	}
	if a.TimestampUs <= 0 {
		return fmt.Errorf("no timestamp: %s", metadata)
	}
	if a.Rows != nil && *a.Rows != write.rows {
		return fmt.Errorf("the write had %d rows: %s", write.rows, metadata)
	}
	if a.DurabilityLevel == "iceberg_committed" && (a.SnapshotID == nil || *a.SnapshotID == "") {
		return fmt.Errorf("no snapshot_id: %s", metadata)
	}
	write.lsn = a.LSN
	write.reached++
	l.lastSequence[a.DurabilityLevel] = a.Sequence
	l.lastLSN[a.DurabilityLevel] = a.LSN
	l.received++
	return nil
}
