package keyring

import (
	"context"
	"errors"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/reseal/reseal/controlplane/office"
)

// errStale means that what a write was based on has changed: nothing was written, look
// again.
var errStale = errors.New("it was changed meanwhile")

// write is one change of a keyring's record.
type write struct {
	name   string
	before int64   // mod revision that the record must have, 0: none
	after  *record // nil: erase
	fence  office.Fence
	// covered, when it is above 0, is the revision at which the acks were looked
	// at. An edge that appeared or acked after it voids the write, so that no
	// epoch is activated past an edge that has just connected.
	covered int64
}

// commit writes in one transaction and returns its revision. Errors: errStale,
// office.ErrDeposed; any other means that the outcome is unknown.
func (s *Server) commit(ctx context.Context, w write) (int64, error) {
	key := s.keys.record(w.name)
	guards := []clientv3.Cmp{w.fence.Guard(s.keys.election()), clientv3.Compare(clientv3.ModRevision(key), "=", w.before)}
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
	answer, err := s.config.Client.Txn(ctx).If(guards...).Then(op).Else(clientv3.OpGet(w.fence.Key)).Commit()
	switch {
	case err != nil:
		return 0, fmt.Errorf("write keyring %q: %w", w.name, err)
	case answer.Succeeded:
		return answer.Header.Revision, nil
	case w.fence.Lost(answer.Responses[0].GetResponseRange().GetKvs()):
		return 0, office.ErrDeposed
	}
	return 0, errStale
}
