package audit

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/encoding/protojson"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// headInterval is how often each replica logs the newest entry, if there is a new one:
// who changes the log in etcd would have to change all of these logs, too.
const headInterval = 10 * time.Minute

// keep follows the log: it writes the file, logs the head, and removes the oldest
// entries.
func (l *Log) keep(ctx context.Context) {
	r := &reader{log: l}
	for { // from where on, which the store has to say
		var err error
		if r.next, r.previous, err = l.start(ctx); err == nil {
			break
		}
		l.config.Logger.Warn("the audit log can't be followed yet", "file", l.config.File, "error", err)
		if pause(ctx, followPause); ctx.Err() != nil {
			return
		}
	}
	var logged time.Time
	_ = r.follow(ctx, func(found []stored) error {
		for _, entry := range found {
			if entry.GetBroken() {
				l.config.Logger.Error("the audit log was changed: an entry does not follow the one before", "number", entry.GetNumber(), "hash", entry.GetHash())
			}
			if entry.GetNumber()%trimEvery == 0 {
				l.trim(ctx, entry.GetNumber())
			}
		}
		l.write(ctx, found)
		if newest := found[len(found)-1]; time.Since(logged) > headInterval {
			logged = time.Now()
			l.config.Logger.Info("newest entry of the audit log", "number", newest.GetNumber(), "hash", newest.GetHash())
		}
		return nil
	})
}

// trim removes what is beyond Limit. All replicas do it.
func (l *Log) trim(ctx context.Context, newest uint64) {
	if newest <= Limit {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if _, err := l.config.Client.Delete(ctx, l.entryKey(0), clientv3.WithRange(l.entryKey(newest-Limit+1))); err != nil {
		l.config.Logger.Warn("old audit entries are still there; that is tried again", "error", err)
	}
}

// start is the number of the first entry to follow, and the hash of the one before: it
// is the one after the last in the file, or the newest that there is. A file of another
// store, or of before a restore, is gone on with from the newest.
func (l *Log) start(ctx context.Context) (next uint64, previous string, err error) {
	newest, _, err := l.readHead(ctx)
	if err != nil {
		return 0, "", err
	}
	if l.config.File == "" {
		return max(newest.Number, 1), "", nil
	}
	last, err := lastEntry(l.config.File)
	if err != nil {
		return 0, "", err
	}
	if last.Number > newest.Number {
		l.config.Logger.Warn("the file of the audit log is ahead of the store, which was restored or is another one", "file", l.config.File,
			"number", last.Number, "newest", newest.Number)
		last = newest
	}
	return last.Number + 1, last.Hash, nil
}

// lastEntry is the last entry in a file, zero when there is none.
func lastEntry(path string) (head, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return head{}, nil
	}
	if err != nil {
		return head{}, err
	}
	defer file.Close()
	size, err := file.Seek(0, io.SeekEnd)
	if err != nil {
		return head{}, err
	}
	tail := make([]byte, min(size, 2*MaxEntry))
	if _, err := file.ReadAt(tail, size-int64(len(tail))); err != nil {
		return head{}, err
	}
	lines := bytes.Split(tail, []byte("\n"))
	for i := len(lines) - 1; i >= 0; i-- {
		entry := &resealv1.AuditEntry{}
		if (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(lines[i], entry) == nil && entry.GetNumber() > 0 {
			return head{entry.GetNumber(), hashOf(lines[i])}, nil
		}
	}
	return head{}, nil
}

// write appends entries to the file, which is opened anew each time, so that it may be
// moved away. What can't be written is tried again: the disk may be full.
func (l *Log) write(ctx context.Context, found []stored) {
	if l.config.File == "" {
		return
	}
	var lines bytes.Buffer
	for _, entry := range found {
		lines.Write(entry.record)
		lines.WriteByte('\n')
	}
	for {
		err := appendTo(l.config.File, lines.Bytes())
		if err == nil {
			return
		}
		l.config.Logger.Error("the audit log can't be written to its file; trying again", "file", l.config.File, "error", err)
		if pause(ctx, followPause); ctx.Err() != nil {
			return
		}
	}
}

// appendTo adds lines to a file as a whole, or not at all.
func appendTo(path string, lines []byte) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return errors.Join(err, file.Close())
	}
	if _, err = file.Write(lines); err != nil && info.Mode().IsRegular() {
		err = errors.Join(err, file.Truncate(info.Size()))
	}
	return errors.Join(err, file.Close())
}
