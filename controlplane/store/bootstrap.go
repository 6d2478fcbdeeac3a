package store

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/types/known/timestamppb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

// keyringKind is the kind of the resource that exists from the start.
const keyringKind = "Keyring"

// bootstrap makes the first revision, which holds the default Keyring. The
// guard lets one of the replicas that start together win; the others find the
// head that it made.
func (s *Store) bootstrap(ctx context.Context) error {
	keyring := resealv1.NewResource(keyringKind)
	keyring.Metadata.Name = resealv1.DefaultKeyring
	resp, err := s.get(ctx, s.keys.fence())
	if err != nil {
		return fmt.Errorf("first start: %w", err)
	}
	base := &base{state: &state{snapshot: resealv1.NewSnapshot("", 0, nil)}}
	if len(resp.Kvs) > 0 {
		base.fence = resp.Kvs[0].ModRevision
	}
	m := mutation{author: "system", message: "first start"}
	tx, err := s.transaction(base, m, &plan{}, []change{replace(keyring.Ref(), nil, keyring, timestamppb.Now())})
	if err != nil {
		return fmt.Errorf("first start: %w", err)
	}
	if _, err := s.commit(ctx, tx); err != nil && !errors.Is(err, errLost) {
		return fmt.Errorf("first start: %w", err)
	}
	return nil
}
