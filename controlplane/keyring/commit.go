package keyring

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

var (
	// errStale means that what a write was based on has changed: nothing was
	// written, look again.
	errStale = errors.New("it was changed meanwhile")
	// errDeposed means that this replica is not the leader any more.
	errDeposed = errors.New("this replica is not the leader any more")
)

// fence is the election key under which a write may happen. A leader that was
// paused, and whose lease ended meanwhile, can't write with its own.
type fence struct {
	key     string // never empty
	created int64  // 0: there is no leader; only commands write then
}

func (f fence) guard(k keys) clientv3.Cmp {
	if f.created == 0 {
		// What does not exist compares like a key of revision 0.
		return clientv3.Compare(clientv3.CreateRevision(k.leaders()), "<", 1).WithPrefix()
	}
	return clientv3.Compare(clientv3.CreateRevision(f.key), "=", f.created)
}

// write is one change of a keyring's record.
type write struct {
	name   string
	before int64   // mod revision that the record must have, 0: none
	after  *record // nil: erase
	fence  fence
	// covered, when it is above 0, is the revision at which the acks were looked
	// at. An edge that appeared or acked after it voids the write, so that no
	// epoch is activated past an edge that has just connected.
	covered int64
}

// commit writes in one transaction and returns its revision. Errors: errStale,
// errDeposed; any other means that the outcome is unknown.
func (s *Server) commit(ctx context.Context, w write) (int64, error) {
	key := s.keys.record(w.name)
	guards := []clientv3.Cmp{w.fence.guard(s.keys), clientv3.Compare(clientv3.ModRevision(key), "=", w.before)}
	if w.covered > 0 {
		guards = append(guards, clientv3.Compare(clientv3.ModRevision(s.keys.covers()), "<", w.covered+1).WithPrefix())
	}
	op := clientv3.OpDelete(key)
	if w.after != nil {
		value, err := w.after.encode()
		if err != nil {
			return 0, err
		}
		op = clientv3.OpPut(key, string(value))
	}
	ctx, cancel := context.WithTimeout(ctx, s.config.RequestTimeout)
	defer cancel()
	answer, err := s.config.Client.Txn(ctx).If(guards...).Then(op).Else(clientv3.OpGet(w.fence.key)).Commit()
	switch {
	case err != nil:
		return 0, fmt.Errorf("write keyring %q: %w", w.name, err)
	case answer.Succeeded:
		return answer.Header.Revision, nil
	case w.fence.lost(answer.Responses[0].GetResponseRange().GetKvs()):
		return 0, errDeposed
	}
	return 0, errStale
}

// lost says whether the election key is not what it was.
func (f fence) lost(found []*mvccpb.KeyValue) bool {
	return f.created > 0 && (len(found) == 0 || found[0].CreateRevision != f.created)
}
