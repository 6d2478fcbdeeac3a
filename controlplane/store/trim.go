package store

import (
	"context"
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// TrimHistory removes kept revisions beyond Config.HistoryLimit and
// Config.HistoryBytes, and returns how many. A change does that as well; this is
// for a store that is too full for one. It needs no Run.
func (s *Store) TrimHistory(ctx context.Context) (int64, error) {
	head, err := s.get(ctx, s.keys.head())
	if err != nil {
		return 0, fmt.Errorf("read the head: %w", err)
	}
	if len(head.Kvs) == 0 {
		return 0, nil
	}
	newest, err := decodeRecord(head.Kvs[0].Value)
	if err != nil {
		return 0, err
	}
	var history []kept
	err = s.scan(ctx, s.keys.histories(), historyPage, head.Header.Revision, func(kv *mvccpb.KeyValue) error {
		sequence, err := s.keys.sequence(string(kv.Key))
		history = append(history, kept{sequence, len(kv.Value)})
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("read the history: %w", err)
	}
	oldest := s.oldestKept(history, newest.Sequence, 0)
	ctx, cancel := context.WithTimeout(ctx, s.cfg.RequestTimeout)
	defer cancel()
	removed, err := s.client.Delete(ctx, s.keys.history(0), clientv3.WithRange(s.keys.history(oldest)))
	if err != nil {
		return 0, fmt.Errorf("remove old history: %w", err)
	}
	return removed.Deleted, nil
}
