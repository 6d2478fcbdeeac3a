package main

import (
	"bytes"
	"errors"
	"io"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// accessBatch is what is written at once. Below it, records wait up to
	// accessInterval, so that the log does not cost a system call per request.
	accessBatch    = 64 << 10
	accessInterval = time.Second
	// accessPending bounds the records that wait for the file, in bytes: some
	// seconds of a busy edge. Beyond it new records are dropped and counted.
	accessPending = 4 << 20
	// accessClose bounds how long the end of the process waits for the file.
	accessClose = 2 * time.Second
)

// accessLog is an io.Writer of whole records, one per call, that never waits
// for the file: a goroutine of its own writes them. What can't be written is
// tried again each accessInterval.
type accessLog struct {
	path    string // "" for an output that can't be opened again
	logger  *slog.Logger
	dropped atomic.Uint64

	wake   chan struct{} // holds a token when a batch is full
	reopen chan struct{} // holds a token when the file is to be opened again
	stop   chan struct{}
	done   chan struct{}

	mu      sync.Mutex
	pending []byte // whole records
	queued  int    // bytes of pending and batch

	// Of the goroutine alone.
	batch   []byte // what is being written
	spare   []byte // the next pending; its memory is batch's until that is written
	out     io.Writer
	file    *os.File // out, if it is ours to close
	torn    bool     // out may end within a record
	failing bool
	before  uint64 // dropped when writing began to fail
}

// openAccessLog writes JSON records to path ("-": to stdout). Closing it writes
// what is left. With an empty path all results are nil.
func openAccessLog(path string, stdout io.Writer, logger *slog.Logger) (*accessLog, error) {
	if path == "" {
		return nil, nil
	}
	l := &accessLog{
		logger: logger, out: stdout,
		wake: make(chan struct{}, 1), reopen: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{}),
	}
	if path != "-" {
		l.path = path
		if err := l.open(); err != nil {
			return nil, err
		}
	}
	go l.run()
	return l, nil
}

// records is the log for the edge, nil if there is none.
func (l *accessLog) records() io.Writer {
	if l == nil {
		return nil
	}
	return l
}

// Dropped counts the records that were lost because the file could not be
// written fast enough, or at all.
func (l *accessLog) Dropped() uint64 {
	if l == nil {
		return 0
	}
	return l.dropped.Load()
}

// Reopen opens the file anew, as after a rotation. It does not wait.
func (l *accessLog) Reopen() {
	if l != nil {
		signalOnce(l.reopen)
	}
}

// Close writes what is left, but waits for that only a bounded time.
func (l *accessLog) Close() {
	if l == nil {
		return
	}
	close(l.stop)
	timer := time.NewTimer(accessClose)
	defer timer.Stop()
	select {
	case <-l.done:
	case <-timer.C:
		l.logger.Warn("the access log takes no more records; the last ones are lost", "path", l.path)
	}
}

// Write implements io.Writer. It never fails and never waits.
func (l *accessLog) Write(record []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.queued+len(record) > accessPending {
		l.dropped.Add(1)
		return len(record), nil
	}
	l.pending = append(l.pending, record...)
	l.queued += len(record)
	if len(l.pending) >= accessBatch {
		signalOnce(l.wake)
	}
	return len(record), nil
}

func signalOnce(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run owns the file.
func (l *accessLog) run() {
	defer close(l.done)
	ticker := time.NewTicker(accessInterval)
	defer ticker.Stop()
	for {
		wake := l.wake
		if l.failing {
			wake = nil // the ticker is soon enough
		}
		select {
		case <-ticker.C:
		case <-wake:
		case <-l.reopen:
			l.flush() // these belong to the old file
			l.renew()
		case <-l.stop:
			l.flush()
			l.end()
			return
		}
		l.flush()
	}
}

// end lets go of the file.
func (l *accessLog) end() {
	if left := bytes.Count(l.batch, newline); left > 0 {
		l.logger.Error("the access log can't be written; its last records are lost", "path", l.path, "dropped_records", left)
	}
	if l.file != nil {
		_ = l.file.Close() // all that can be written is written
	}
}

var newline = []byte{'\n'}

// flush writes what an earlier flush left, and then all that is pending, until
// an error.
func (l *accessLog) flush() {
	for {
		if len(l.batch) == 0 && !l.take() {
			return
		}
		written, err := l.write(l.batch)
		l.batch = l.batch[written:]
		l.mu.Lock()
		l.queued -= written
		l.mu.Unlock()
		if err != nil {
			l.fails(err)
			return
		}
		l.works()
	}
}

// take makes what is pending the batch.
func (l *accessLog) take() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.pending) == 0 {
		return false
	}
	l.batch, l.pending = l.pending, l.spare[:0]
	l.spare = l.batch
	if cap(l.spare) > 4*accessBatch {
		l.spare = nil // after a burst: don't hold its memory
	}
	return true
}

// write writes whole records and returns how many bytes of them are in the
// file. After a write that stopped within a record, that record is written
// again on a line of its own, so that no other is spoilt.
func (l *accessLog) write(records []byte) (written int, err error) {
	if l.torn {
		if _, err := l.out.Write(newline); err != nil {
			return 0, err
		}
		l.torn = false
	}
	for len(records) > 0 {
		chunk := records[:wholeRecords(records)]
		n, err := l.out.Write(chunk)
		if err != nil {
			whole := bytes.LastIndexByte(chunk[:n], '\n') + 1
			l.torn = n > whole
			return written + whole, err
		}
		written += n
		records = records[n:]
	}
	return written, nil
}

// wholeRecords is how many bytes of records to write at once. They end with a
// record, since another process may append to the same file.
func wholeRecords(records []byte) int {
	if len(records) <= accessBatch {
		return len(records)
	}
	if end := bytes.LastIndexByte(records[:accessBatch], '\n'); end >= 0 {
		return end + 1
	}
	return bytes.IndexByte(records, '\n') + 1
}

func (l *accessLog) fails(err error) {
	if !l.failing {
		l.failing, l.before = true, l.dropped.Load()
		l.logger.Error("the access log can't be written; writing is retried until it succeeds, and requests go on", "path", l.path, "error", err)
	}
}

func (l *accessLog) works() {
	if l.failing {
		l.failing = false
		l.logger.Info("the access log is being written again", "path", l.path, "dropped_records", l.dropped.Load()-l.before)
	}
}

// renew opens the file anew and keeps the old one when that fails.
func (l *accessLog) renew() {
	if l.path == "" {
		return
	}
	old := l.file
	if err := l.open(); err != nil {
		l.logger.Error("the access log can't be opened anew; records go to the old file", "path", l.path, "error", err)
		return
	}
	_ = old.Close() // what was written is written
	l.logger.Info("the access log was opened anew", "path", l.path)
}

// open opens the file. A FIFO that nobody reads is an error, not a wait.
func (l *accessLog) open() error {
	file, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|syscall.O_NONBLOCK, 0o640)
	if err != nil {
		if errors.Is(err, syscall.ENXIO) {
			err = &os.PathError{Op: "open", Path: l.path, Err: errors.New("it is a FIFO that nobody reads")}
		}
		return err
	}
	l.file, l.out, l.torn = file, file, endsWithinRecord(l.path)
	return nil
}

// endsWithinRecord reports whether a file ends without a newline, as after a
// crash or on a full disk.
func endsWithinRecord(path string) bool {
	info, err := os.Stat(path)
	if err != nil || !info.Mode().IsRegular() || info.Size() == 0 {
		return false
	}
	file, err := os.Open(path)
	if err != nil {
		return false // it may be write-only
	}
	defer file.Close()
	var last [1]byte
	_, err = file.ReadAt(last[:], info.Size()-1)
	return err == nil && last[0] != '\n'
}
