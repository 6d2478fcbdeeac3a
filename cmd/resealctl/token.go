package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/durationpb"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func newTokenCommand(a *app) *cobra.Command {
	return newGroupCommand("token", "Make and revoke join tokens of edges",
		`Make and revoke join tokens. An edge trades its token, once, for a certificate
that it renews by itself from then on. A token may be for several edges.`,
		newTokenCreateCommand(a), newTokenListCommand(a), newTokenRevokeCommand(a))
}

// tokenView is a token as -o json and yaml show it. The token itself is only
// there when it was just made.
type tokenView struct {
	ID        string            `json:"id"`
	Edge      string            `json:"edge"`
	Labels    map[string]string `json:"labels"`
	CreatedAt string            `json:"createdAt"`
	ExpiresAt string            `json:"expiresAt"`
	CreatedBy string            `json:"createdBy"`
	UsesLeft  uint32            `json:"usesLeft"`
	Token     string            `json:"token,omitempty"`
}

func viewToken(t *resealv1.JoinToken) tokenView {
	labels := t.GetLabels()
	if labels == nil {
		labels = map[string]string{}
	}
	return tokenView{ID: t.GetTokenId(), Edge: t.GetEdge(), Labels: labels, CreatedAt: utcStamp(t.GetCreatedAt()),
		ExpiresAt: utcStamp(t.GetExpiresAt()), CreatedBy: t.GetCreatedBy(), UsesLeft: t.GetUsesLeft()}
}

func newTokenCreateCommand(a *app) *cobra.Command {
	var (
		id, labels string
		ttl        time.Duration
		uses       uint32
	)
	cmd := &cobra.Command{
		Use:   "create --id EDGE",
		Short: "Make a join token for an edge, or for several",
		Long: `Make a join token for an edge. It is shown only now. -o name prints the token alone.

An id with "*", each for any characters, is for as many edges as --uses says whose ids
match. Such a token enrols new edges only: it replaces none that is enrolled.`,
		Example: `  resealctl token create --id edge-1 --labels zone=eu --ttl 1h -o name > edge-1.token
  resealctl token create --id 'shop-*' --uses 200 --labels team=shop --ttl 24h -o name > shop.token`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringVar(&id, "id", "", "id of the `edge` that it is for, or a pattern with *")
	cmd.Flags().StringVar(&labels, "labels", "", "`labels` that the edge will have: k=v,...")
	cmd.Flags().DurationVar(&ttl, "ttl", time.Hour, "how long it may be used, at most 720h")
	cmd.Flags().Uint32Var(&uses, "uses", 1, "how many edges may enrol with it, at most 10000; more than 1 only with a pattern")
	_ = cmd.MarkFlagRequired("id")
	format := registerFormat(cmd, "table", "name", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		want, err := parseLabels(labels)
		if err != nil {
			return err
		}
		if ttl <= 0 {
			return usagef("--ttl must be more than 0")
		}
		request := &resealv1.CreateTokenRequest{Id: id, Labels: want, Ttl: durationpb.New(ttl), Uses: uses}
		return a.createToken(cmd.Context(), format, request)
	}
	return cmd
}

func (a *app) createToken(ctx context.Context, f *format, request *resealv1.CreateTokenRequest) error {
	client, err := a.connect()
	if err != nil {
		return err
	}
	response, err := client.enrollment.CreateToken(ctx, request)
	if err != nil {
		return err
	}
	info := response.GetInfo()
	switch f.value {
	case "name":
		a.printf("%s\n", response.GetToken())
		return nil
	case "json", "yaml":
		view := viewToken(info)
		view.Token = response.GetToken()
		return a.printDocument(f, view)
	}
	d := describer{w: a.out}
	d.line(0, "Edge", invited(info))
	d.line(0, "ID", info.GetTokenId())
	d.labels("Labels", info.GetLabels())
	d.line(0, "Expires", stamp(info.GetExpiresAt())+" ("+expiry(info.GetExpiresAt().AsTime())+")")
	d.line(0, "Token", response.GetToken())
	d.flush()
	id, where := info.GetEdge(), "on the edge"
	if strings.Contains(id, "*") {
		id, where = "ID", "on each edge"
	}
	a.printf(`
Write the token to a file %s (mode 0600) and start:
  reseal-edge --control-plane %s --id %s --join-token-file FILE
`, where, strings.Join(client.target.controlPlane, ","), id)
	return nil
}

// invited is whom a token is for.
func invited(t *resealv1.JoinToken) string {
	if strings.Contains(t.GetEdge(), "*") {
		return fmt.Sprintf("%s (%d left)", t.GetEdge(), t.GetUsesLeft())
	}
	return t.GetEdge()
}

func newTokenListCommand(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "Show the tokens that are not used or expired",
		Args:  cobra.NoArgs,
	}
	format := registerFormat(cmd, "table", "name", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		client, err := a.connect()
		if err != nil {
			return err
		}
		list, err := client.enrollment.ListTokens(cmd.Context(), &resealv1.ListTokensRequest{})
		if err != nil {
			return err
		}
		return a.printTokens(format, list.GetTokens())
	}
	return cmd
}

func (a *app) printTokens(f *format, tokens []*resealv1.JoinToken) error {
	if f.structured() {
		views := make([]tokenView, len(tokens))
		for i, t := range tokens {
			views[i] = viewToken(t)
		}
		return a.printDocument(f, map[string]any{"tokens": views})
	}
	if f.value == "name" {
		for _, t := range tokens {
			a.printf("%s\n", t.GetTokenId())
		}
		return nil
	}
	if len(tokens) == 0 {
		a.warnf("No tokens.\n")
		return nil
	}
	t := newTable(a.out, "EDGE", "ID", "LABELS", "EXPIRES", "CREATED BY", "AGE")
	for _, token := range tokens {
		t.add(invited(token), token.GetTokenId(), joinLabels(token.GetLabels()),
			expiry(token.GetExpiresAt().AsTime()), orNone(token.GetCreatedBy()), age(token.GetCreatedAt()))
	}
	t.flush()
	return nil
}

func newTokenRevokeCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "revoke ID...",
		Short:             "Make tokens useless",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeTokens,
		RunE: func(cmd *cobra.Command, ids []string) error {
			client, err := a.connect()
			if err != nil {
				return err
			}
			var failed []error
			for _, id := range ids {
				_, err := client.enrollment.RevokeToken(cmd.Context(), &resealv1.RevokeTokenRequest{TokenId: id})
				switch {
				case errors.Is(err, errNotFound):
					failed = append(failed, notFound("token", id))
				case err != nil:
					return err
				default:
					a.printf("token/%s revoked\n", id)
				}
			}
			return errors.Join(failed...)
		},
	}
}
