package main

import (
	"bufio"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"
)

// openAccessLog writes one JSON record per request to path. Records are
// buffered for up to a second, so that the log costs no system call a request;
// closeLog writes what is left.
func openAccessLog(path string, stdout io.Writer) (logger *slog.Logger, closeLog func(), err error) {
	if path == "" {
		return nil, func() {}, nil
	}
	target, closeTarget := stdout, func() {}
	if path != "-" {
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
		if err != nil {
			return nil, nil, err
		}
		target, closeTarget = file, func() { file.Close() }
	}
	buffer := newBufferedLog(target)
	return slog.New(slog.NewJSONHandler(buffer, nil)), func() { buffer.close(); closeTarget() }, nil
}

type bufferedLog struct {
	mu     sync.Mutex
	buffer *bufio.Writer
	stop   chan struct{}
	done   chan struct{}
}

func newBufferedLog(w io.Writer) *bufferedLog {
	log := &bufferedLog{buffer: bufio.NewWriterSize(w, 64<<10), stop: make(chan struct{}), done: make(chan struct{})}
	go log.flushEvery(time.Second)
	return log
}

func (l *bufferedLog) Write(record []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A record is written whole, so that another process that appends to the
	// same file does not cut it in two.
	if l.buffer.Available() < len(record) {
		_ = l.buffer.Flush()
	}
	return l.buffer.Write(record)
}

func (l *bufferedLog) flushEvery(interval time.Duration) {
	defer close(l.done)
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-l.stop:
		}
		l.mu.Lock()
		// A log that can't be written must not stop the traffic: the error
		// sticks in the buffer, which drops what follows.
		_ = l.buffer.Flush()
		l.mu.Unlock()
		select {
		case <-l.stop:
			return
		default:
		}
	}
}

func (l *bufferedLog) close() {
	close(l.stop)
	<-l.done
}
