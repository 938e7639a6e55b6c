package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
)

// ackReader reads a stream's acks in its own goroutine while the caller writes.
type ackReader struct {
	mutex  sync.Mutex
	ledger *ackLedger
	// changed is closed and replaced at each ack and at the end.
	changed chan struct{}
	ended   bool
	err     error
}

// readAcks starts to read; receive returns an ack's JSON, io.EOF at the stream's end.
func readAcks(receive func() ([]byte, error)) *ackReader {
	r := &ackReader{ledger: newAckLedger(), changed: make(chan struct{})}
	go func() {
		for !r.step(receive()) {
		}
	}()
	return r
}

// step takes what receive returned and tells whether the stream is over.
func (r *ackReader) step(metadata []byte, err error) bool {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	if err == nil && r.err == nil {
		r.err = r.ledger.take(metadata)
	} else if err != nil {
		r.ended = true
		if r.err == nil && !errors.Is(err, io.EOF) {
			r.err = err
		}
	}
	close(r.changed)
	r.changed = make(chan struct{})
	return r.ended
}

// expect announces a write; call it before the write is sent.
func (r *ackReader) expect(durability string, rows int64) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	r.ledger.expect(durability, rows)
}

func (r *ackReader) counts() (received, outstanding int) {
	r.mutex.Lock()
	defer r.mutex.Unlock()
	return r.ledger.received, r.ledger.outstanding()
}

func (r *ackReader) wait(ctx context.Context, what string, done func() bool) error {
	for {
		r.mutex.Lock()
		finished, changed, err := done(), r.changed, r.err
		ended := r.ended
		r.mutex.Unlock()
		switch {
		case err != nil:
			return err
		case finished:
			return nil
		case ended:
			received, outstanding := r.counts()
			return fmt.Errorf("the stream ended before %s: %d acks came, %d did not", what, received, outstanding)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			received, outstanding := r.counts()
			return fmt.Errorf("waited in vain for %s: %d acks came, %d did not", what, received, outstanding)
		}
	}
}

// waitAcks returns when so many acks have come, before the stream's end.
func (r *ackReader) waitAcks(ctx context.Context, count int) error {
	return r.wait(ctx, fmt.Sprintf("ack %d", count), func() bool { return r.ledger.received >= count })
}

// waitEnd returns when the stream has ended with OK and each write has had all its acks.
func (r *ackReader) waitEnd(ctx context.Context) error {
	if err := r.wait(ctx, "its end", func() bool { return r.ended }); err != nil {
		return err
	}
	if received, outstanding := r.counts(); outstanding > 0 {
		return fmt.Errorf("the stream ended with OK after %d acks: %d did not come", received, outstanding)
	}
	return nil
}

// waitStatus returns the error that ended the stream, nil for OK.
func (r *ackReader) waitStatus(ctx context.Context) error {
	for {
		r.mutex.Lock()
		ended, err, changed := r.ended, r.err, r.changed
		r.mutex.Unlock()
		if ended {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("the stream did not end")
		}
	}
}
