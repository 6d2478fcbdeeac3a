package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	resealv1 "github.com/reseal/reseal/proto/reseal/v1"
)

func newUserRevokeCommand(a *app) *cobra.Command {
	var reason string
	cmd := &cobra.Command{
		Use:   "revoke NAME...",
		Short: "Take users back: all replicas refuse them within a second",
		Long: `Take users back: within a second all replicas end what they watch, refuse their
calls and don't renew their certificates. Edges that serve --admin with TLS take
a certificate until it expires. The last administrator can't be revoked; the one
of the first start, local, can once there is another.`,
		Example:           "  resealctl user revoke vera --reason 'laptop stolen'",
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: a.completeUsers,
	}
	cmd.Flags().StringVar(&reason, "reason", "", "`why`, for those who are refused and for the records")
	cmd.RunE = func(cmd *cobra.Command, names []string) error {
		client, err := a.connect()
		if err != nil {
			return err
		}
		return revokeEach(names, "user", func(name string) error {
			_, err := client.enrollment.RevokeUser(cmd.Context(), &resealv1.RevokeUserRequest{Name: name, Reason: reason})
			if err == nil {
				a.printf("user/%s revoked\n", name)
			}
			return err
		})
	}
	return cmd
}

// revokeEach revokes one after the other, and names those that there are not.
func revokeEach(names []string, what string, revoke func(name string) error) error {
	var failed []error
	for _, name := range names {
		switch err := revoke(name); {
		case errors.Is(err, errNotFound):
			failed = append(failed, notFound(what, name))
		case err != nil:
			return errors.Join(append(failed, err)...)
		}
	}
	return errors.Join(failed...)
}

func newRevokeCommand(a *app) *cobra.Command {
	var (
		reason string
		list   bool
	)
	cmd := &cobra.Command{
		Use:   "revoke {EDGE... | --list}",
		Short: "Take edges back: all replicas refuse them within a second",
		Long: `Take edges back, because they were stolen, taken over or are no more: within a
second all replicas end their streams, refuse their calls and don't renew their
certificates, and other edges drop the TLS sessions that came from them. The id
can be enrolled again with another join token.

What an edge had it may still have: it goes on serving with what it knows, and
the private keys of its listeners and its ticket keys are no secret from whoever
has it. Which ticket keys those are is said, with the command that makes them
useless and what that costs; replace the certificates of its listeners, too.

--list shows the revocations of edges and users whose certificates have not
expired yet.`,
		Example:           "  resealctl revoke edge-1 --reason 'disk stolen'\n  resealctl revoke --list",
		ValidArgsFunction: a.completeEdges,
		Args: func(cmd *cobra.Command, args []string) error {
			if list {
				return cobra.NoArgs(cmd, args)
			}
			return cobra.MinimumNArgs(1)(cmd, args)
		},
	}
	cmd.Flags().StringVar(&reason, "reason", "", "`why`, for the records")
	cmd.Flags().BoolVar(&list, "list", false, "show what is revoked")
	cmd.MarkFlagsMutuallyExclusive("list", "reason")
	format := registerFormat(cmd, "table", "json", "yaml")
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		client, err := a.connect()
		if err != nil {
			return err
		}
		if list {
			return a.listRevocations(cmd.Context(), client, format)
		}
		return revokeEach(ids, "edge", func(id string) error {
			response, err := client.enrollment.RevokeEdge(cmd.Context(), &resealv1.RevokeEdgeRequest{Id: id, Reason: reason})
			if err != nil {
				return err
			}
			return a.printRevokedEdge(format, id, response)
		})
	}
	return cmd
}

// heldKeysView are ticket keys as -o json and yaml show them.
type heldKeysView struct {
	Keyring   string   `json:"keyring"`
	Epochs    []uint64 `json:"epochs"`
	TicketAge string   `json:"ticketAge"`
}

func (a *app) printRevokedEdge(f *format, id string, response *resealv1.RevokeEdgeResponse) error {
	if f.structured() {
		views := []heldKeysView{}
		for _, k := range response.GetHeldKeys() {
			views = append(views, heldKeysView{k.GetKeyring(), k.GetEpochs(), configured(k.GetTicketAge())})
		}
		a.separateDocuments(f)
		return a.printDocument(f, map[string]any{"revocation": viewRevocation(response.GetRevocation()), "heldKeys": views})
	}
	a.printf("edge/%s revoked\n", id)
	for _, k := range response.GetHeldKeys() {
		flags := make([]string, len(k.GetEpochs()))
		for i, epoch := range k.GetEpochs() {
			flags[i] = fmt.Sprintf(" --epoch %d", epoch)
		}
		a.printf("It held %s of keyring %s. To make them useless: resealctl keyring revoke %s%s\n  %s\n",
			epochsText(k.GetEpochs()), k.GetKeyring(), k.GetKeyring(), strings.Join(flags, ""),
			costText(k.GetKeyring(), &resealv1.RevokeResponse{Epochs: k.GetEpochs(), TicketAge: k.GetTicketAge()}))
	}
	return nil
}

// revocationView is a revocation as -o json and yaml show it.
type revocationView struct {
	Identity    string `json:"identity"`
	RevokedAt   string `json:"revokedAt"`
	RevokedBy   string `json:"revokedBy"`
	Reason      string `json:"reason"`
	ForgottenAt string `json:"forgottenAt"`
}

func viewRevocation(r *resealv1.Revocation) revocationView {
	return revocationView{Identity: resealv1.Label(r.GetRole()) + "/" + r.GetName(), RevokedAt: utcStamp(r.GetRevokedAt()),
		RevokedBy: r.GetRevokedBy(), Reason: r.GetReason(), ForgottenAt: utcStamp(r.GetForgottenAt())}
}

func (a *app) listRevocations(ctx context.Context, c *client, f *format) error {
	list, err := c.enrollment.ListRevocations(ctx, &resealv1.ListRevocationsRequest{})
	if err != nil {
		return err
	}
	views := make([]revocationView, len(list.GetRevocations()))
	for i, r := range list.GetRevocations() {
		views[i] = viewRevocation(r)
	}
	if f.structured() {
		return a.printDocument(f, map[string]any{"revocations": views})
	}
	if len(views) == 0 {
		a.warnf("Nobody is revoked.\n")
		return nil
	}
	t := newTable(a.out, "IDENTITY", "REVOKED BY", "AGE", "FORGOTTEN", "REASON")
	for i, r := range list.GetRevocations() {
		t.add(views[i].Identity, r.GetRevokedBy(), age(r.GetRevokedAt()), expiry(r.GetForgottenAt().AsTime()), r.GetReason())
	}
	t.flush()
	return nil
}

func (a *app) completeUsers(cmd *cobra.Command, args []string, typed string) ([]string, cobra.ShellCompDirective) {
	names := a.quietly(cmd, func(ctx context.Context, c *client) []string {
		var names []string
		list, _ := c.enrollment.ListUsers(ctx, &resealv1.ListUsersRequest{})
		for _, user := range list.GetUsers() {
			if !slices.Contains(args, user.GetName()) {
				names = append(names, user.GetName())
			}
		}
		return names
	})
	return startingWith(names, typed), noFiles
}
