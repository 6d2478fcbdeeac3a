package backup

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// pageSize bounds the keys of one answer.
	pageSize = 100
	// requestTimeout bounds one request to etcd.
	requestTimeout = 30 * time.Second
	// restoring is the key, below the prefix, that stands while a restore is under way.
	restoring = "restoring"
)

var (
	// ErrNotEmpty is the error of a restore into a store that holds something.
	ErrNotEmpty = errors.New("the store is not empty")
	// ErrUnfinished means that a restore was interrupted.
	ErrUnfinished = errors.New("a restore into this store was interrupted: empty it and restore again")
)

// Write writes all keys below prefix, as they were at one revision, and returns how
// many there are. What stands on a lease is left out: it is true of a moment only.
func Write(ctx context.Context, client *clientv3.Client, prefix string, cipher Cipher, w io.Writer) (keys int, err error) {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	if _, err := w.Write(append([]byte(magic), id...)); err != nil {
		return 0, err
	}
	var (
		pending  []entry
		size     int
		number   uint64
		revision int64
	)
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	for more := true; more; {
		bounded, cancel := context.WithTimeout(ctx, requestTimeout)
		answer, err := client.Get(bounded, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(revision))
		cancel()
		if err != nil {
			return keys, fmt.Errorf("read the store: %w", err)
		}
		revision = answer.Header.Revision
		for _, kv := range answer.Kvs {
			from = string(kv.Key) + "\x00"
			if kv.Lease != 0 {
				continue
			}
			keys++
			pending = append(pending, entry{strings.TrimPrefix(string(kv.Key), prefix), kv.Value, kv.ModRevision})
			if size += len(kv.Key) + len(kv.Value); size >= frameSize {
				if err := writeFrame(w, cipher, id, number, false, pending); err != nil {
					return keys, err
				}
				pending, size, number = nil, 0, number+1
			}
		}
		more = answer.More && len(answer.Kvs) > 0
	}
	return keys, writeFrame(w, cipher, id, number, true, pending)
}

// Limits bound a transaction of the store.
type Limits struct{ Ops, Bytes int }

// Restore writes what r holds below prefix, when nothing is there, and returns how many
// keys that is. All of r is checked first. What was written in one transaction is so
// again, and in the same order: revisions are new numbers, but mean the same.
func Restore(ctx context.Context, client *clientv3.Client, prefix string, cipher Cipher, limits Limits, r io.Reader) (keys int, err error) {
	entries, err := read(r, cipher)
	if err != nil {
		return 0, err
	}
	slices.SortStableFunc(entries, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.Revision, b.Revision), cmp.Compare(a.rank(), b.rank()))
	})
	marker := prefix + restoring
	empty := clientv3.Compare(clientv3.CreateRevision(prefix), "<", 1).WithPrefix()
	answer, err := transact(ctx, client, []clientv3.Cmp{empty}, clientv3.OpPut(marker, time.Now().UTC().Format(time.RFC3339)))
	if err != nil {
		return 0, err
	}
	if !answer {
		return 0, ErrNotEmpty
	}
	unfinished := clientv3.Compare(clientv3.Version(marker), "=", 1)
	for len(entries) > 0 {
		n := limits.next(prefix, entries)
		var ops []clientv3.Op
		for _, e := range entries[:n] {
			ops = append(ops, clientv3.OpPut(prefix+e.Key, string(e.Value)))
		}
		if ok, err := transact(ctx, client, []clientv3.Cmp{unfinished}, ops...); err != nil || !ok {
			return keys, errors.Join(err, ErrUnfinished)
		}
		keys += n
		entries = entries[n:]
	}
	if ok, err := transact(ctx, client, []clientv3.Cmp{unfinished}, clientv3.OpDelete(marker)); err != nil || !ok {
		return keys, errors.Join(err, ErrUnfinished)
	}
	return keys, nil
}

// next is how many of entries are the next transaction: those of one, unless this
// store takes smaller ones than the one that they come from.
func (l Limits) next(prefix string, entries []entry) int {
	n, size := 0, 0
	for n < len(entries) && entries[n].Revision == entries[0].Revision {
		size += len(prefix) + len(entries[n].Key) + len(entries[n].Value)
		if n == l.Ops-1 || n > 0 && size > l.Bytes {
			break
		}
		n++
	}
	for n > 1 && n < len(entries) && entries[n].Revision == entries[0].Revision && entries[n].rank() > 0 && entries[n-1].rank() > 0 {
		n-- // the head, its record and its audit entry stay together
	}
	return n
}

// rank orders what was written in one transaction: the head of the configuration, the
// record of its change and its audit entry come last, so that they have one revision even when it
// becomes several.
func (e entry) rank() int {
	if e.Key == "head" || strings.HasPrefix(e.Key, "history/") || strings.HasPrefix(e.Key, "audit/") {
		return 1
	}
	return 0
}

func transact(ctx context.Context, client *clientv3.Client, guards []clientv3.Cmp, ops ...clientv3.Op) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	answer, err := client.Txn(ctx).If(guards...).Then(ops...).Commit()
	if err != nil {
		return false, fmt.Errorf("write the store: %w", err)
	}
	return answer.Succeeded, nil
}

// Check is ErrUnfinished when a restore below prefix was interrupted.
func Check(ctx context.Context, client *clientv3.Client, prefix string) error {
	answer, err := client.Get(ctx, prefix+restoring)
	if err == nil && len(answer.Kvs) > 0 {
		return ErrUnfinished
	}
	return err
}
