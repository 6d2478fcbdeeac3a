package keyring

import (
	"context"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// doubtPause is the least time between two questions for the newest record.
const doubtPause = time.Second

// knows says whether this replica knows the epochs that an edge holds since began, or
// has asked etcd later: an edge must not lose an epoch by coming to a slower replica.
// The caller holds mu.
func (st *state) knows(claims map[string]uint64, began time.Time) bool {
	if st.confirmed.After(began) && st.revision >= st.atLeast {
		return true
	}
	for name, number := range claims {
		if k, ok := st.spec(name); ok {
			if found := st.current(k); found != nil && found.record != nil && number > found.Last {
				return false
			}
		}
	}
	return true
}

// doubt has the newest record asked for, soon.
func (s *Server) doubt() {
	select {
	case s.doubts <- struct{}{}:
	default:
	}
}

// confirm asks for the newest record when there is doubt, until ctx ends.
func (s *Server) confirm(ctx context.Context) {
	for {
		select {
		case <-s.doubts:
		case <-ctx.Done():
			return
		}
		asked := time.Now()
		bounded, cancel := context.WithTimeout(ctx, s.config.RequestTimeout)
		answer, err := s.config.Client.Get(bounded, s.keys.records(), newestRecord...)
		cancel()
		if err != nil {
			s.log.Debug("an edge holds newer epochs than this replica knows of, and etcd does not answer", "error", err)
			s.doubt()
		} else {
			s.state.mu.Lock()
			s.state.confirmed, s.state.atLeast = asked, 0
			if len(answer.Kvs) > 0 {
				s.state.atLeast = answer.Kvs[0].ModRevision
			}
			s.state.notify(true)
			s.state.mu.Unlock()
		}
		if pause(ctx, doubtPause) != nil {
			return
		}
	}
}

// newestRecord asks for the key that was changed last.
var newestRecord = []clientv3.OpOption{
	clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(1),
	clientv3.WithSort(clientv3.SortByModRevision, clientv3.SortDescend),
}
